"""A start for FlexTok that needs no search: local principal components as tokens.

From random weights a 1D tokenizer must find at once what its registers should say and how its decoder
should read them, which takes millions of pictures. On a laptop we begin where that search tends to
end up: register i reads one patch of the latents and says a few of its principal components, the
coarse ones of every patch first, spread over the picture. The encoder is a FlexTok encoder of one
block whose weights are written down here; its ids are those of finite scalar quantization of
whitened components (Karhunen 1947, Loeve 1948). The decoder starts as their linear reading, beside
small random weights, and is trained as always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modalities.errors import InputError
from ..tokenizers.image.flextok import FlexTok, PatchEmbed, norm

# Spread of a whitened component before the quantizer's tanh; about the least error for 8 levels.
SPREAD = 0.6
# Content is small beside the position in a token, so that layer norm hardly scales it.
CONTENT = 0.1


def patch_order(grid: int) -> Tensor:
    """Patches ``[grid * grid]`` in bit-reversed Z-order: every prefix is spread over the picture."""
    bits = (grid - 1).bit_length()

    def rank(patch: int) -> list[tuple[int, int]]:
        row, column = divmod(patch, grid)
        places = [(row >> b & 1, column >> b & 1) for b in range(bits)]
        return [(r ^ c, r) for r, c in places]

    return torch.tensor(sorted(range(grid * grid), key=rank))


def patch_vectors(embed: PatchEmbed, latents: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` -> ``[B, patches, p p C]`` in the order that the layer reads."""
    p = embed.patch_size
    return (
        latents.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    )


def place_reader(table: Tensor) -> Tensor:
    """Map ``[2 grid, D]`` from a normalised token to its row and column, centred one-hot each.

    Args:
        table: positions ``[grid, grid, D]``.
    """
    grid = len(table)
    eye = torch.eye(grid) - 1 / grid
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    wanted = torch.cat([eye[rows.flatten()], eye[columns.flatten()]], dim=1)
    return wanted.T @ torch.linalg.pinv(norm(table.flatten(0, 1)).T, rtol=1e-4)


def free_directions(table: Tensor, count: int) -> Tensor:
    """Orthonormal ``[count, D]``, orthogonal to every position and to the mean of a token."""
    dim = table.shape[-1]
    taken = torch.cat([table.flatten(0, 1), torch.ones(1, dim)])
    # In float64, so that rounding of the sums does not decide what is written down.
    _, values, directions = torch.linalg.svd(taken.double())
    rank = int((values > 1e-4 * values[0]).sum())
    # The rest of the directions is any basis: take one that rounding does not decide.
    draws = torch.randn(dim, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = draws - directions[:rank].T @ (directions[:rank] @ draws)
    return torch.linalg.qr(draws).Q.T.float()


def look_at_own_place(qkv: Tensor, reader: Tensor, head_dim: int, heads: int) -> None:
    """Set queries and keys ``[3 D, D]`` of the first heads to the place: tokens of one place meet."""
    dim = len(qkv) // 3
    basis = torch.linalg.qr(torch.cat([torch.ones(head_dim, 1), torch.randn(head_dim, 16)], 1))[0]
    projection = basis[:, 1 : 1 + len(reader)] @ reader
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        qkv[rows] = projection
        qkv[dim:][rows] = projection


@torch.no_grad()
def local_components(tokenizer: FlexTok, latents: Tensor) -> None:
    """Write the encoder and the decoder's routing, in place.

    Args:
        latents: ``[M, C, h, w]`` of the training pictures (all, or some thousands).

    Raises:
        InputError: a tokenizer of another form: one encoder block, registers a multiple of the
            patches, and no more components than a patch has values or a head has dimensions.
    """
    config, encoder = tokenizer.config, tokenizer.encoder
    grid = config.latent_size // config.patch_size
    patches, code_dim = grid * grid, tokenizer.quantizer.dim
    levels, rest = divmod(config.num_registers, patches)
    components, size = levels * code_dim, encoder.patch_embed.proj.in_features
    if (
        len(encoder.blocks) != 1
        or len(tokenizer.decoder.blocks) < 2
        or rest
        or components > min(size, config.head_dim)
        or grid != encoder.patch_embed.positions.shape[0]
        or 2 * grid > 16
        or config.encoder_dim < components + levels + code_dim + 2 * grid
        or config.decoder_dim < size + components + levels + code_dim + 2 * grid + 1
    ):
        raise InputError(
            "start: components needs encoder_depth 1, decoder_depth 2 or more, max_grid = latent_size / patch_size up to 8, "
            "num_registers a multiple of the patches, and at most as many components a patch as it "
            f"has values; got {config.num_registers} registers for {patches} patches of {size} values."
        )
    table = encoder.patch_embed.positions
    order = patch_order(grid)
    place = order.repeat(levels)
    level = torch.arange(levels).repeat_interleave(patches)

    vectors = patch_vectors(encoder.patch_embed, latents).flatten(0, 1)
    mean = vectors.mean(0)
    centred = (vectors - mean).double()
    values, basis = (x.float() for x in torch.linalg.eigh(centred.T @ centred / len(vectors)))
    # What the pictures do not have is left near zero, not blown up to noise of unit variance.
    values = values.flip(0)[:components].clamp(min=1e-6 * float(values[-1]))
    whiten = basis.flip(1)[:, :components] / values.sqrt()

    free = free_directions(table, components + levels + code_dim)
    content, rank, code = free.split([components, levels, code_dim])
    block = encoder.blocks[0]
    for parameter in (*encoder.patch_embed.proj.parameters(), *block.parameters()):
        parameter.zero_()
    encoder.patch_embed.proj.weight.copy_(CONTENT * content.T @ whiten.T)
    encoder.patch_embed.proj.bias.copy_(-CONTENT * content.T @ (whiten.T @ mean))
    encoder.registers.copy_(table.flatten(0, 1)[place] + 4 * rank[level])

    # Attention: a register takes the content of its patch.
    reader = place_reader(table)
    look_at_own_place(block.attn.qkv.weight, reader, config.head_dim, 1)
    dim = config.encoder_dim
    block.attn.qkv.weight[2 * dim : 2 * dim + components] = content
    block.attn.proj.weight[:, :components] = content.T
    # Gated MLP: the level opens the gates of its components, which go on to the code's directions.
    hidden = block.mlp.fc2.in_features
    gates, inputs = block.mlp.fc1_fc3.weight.split(hidden)
    for index in range(components):
        gates[index] = rank[index // code_dim]
        inputs[index] = content[index]
        block.mlp.fc2.weight[:, index] = code[index % code_dim]
    encoder.proj.weight.copy_(code)
    encoder.proj.bias.zero_()

    # How much arrives depends a little on the level: measured, and set to the wanted spread.
    sample = latents[:: max(1, len(latents) // 2048)]
    spread = encoder(sample, config.num_registers).unflatten(1, (levels, patches)).std((0, 2))
    block.mlp.fc2.weight[:, :components] *= 0.01 / spread.flatten()
    encoder.proj.weight.mul_(SPREAD / 0.01)
    _write_decoder(tokenizer, vectors, whiten, mean, place, level)


def _write_decoder(
    tokenizer: FlexTok, vectors: Tensor, whiten: Tensor, mean: Tensor, place: Tensor, level: Tensor
) -> None:
    """The best linear reading of the codes at t = 1, beside a small random decoder.

    Block 0 puts the code of a register on the axes of its components; block 1 takes them from the
    registers to the patch of their place; the output turns them into latents. Training goes on from
    there: to other times and lengths, and to what is not linear.
    """
    config, decoder = tokenizer.config, tokenizer.decoder
    size, components = whiten.shape
    code_dim = tokenizer.quantizer.dim
    levels = components // code_dim
    dim = config.decoder_dim
    table = decoder.patch_embed.positions
    free = free_directions(table, dim)
    parts = [size, components, levels, code_dim, 1]
    noisy, content, rank, code, nowhere, rest = free.split([*parts, len(free) - sum(parts)])

    # Code -> component -> latents, by least squares over the training pictures.
    wanted = (vectors - mean) @ whiten
    codes = tokenizer.quantizer(SPREAD * wanted.unflatten(1, (levels, code_dim)))[0].flatten(1)
    centre = codes.mean(0)
    slope = (wanted * (codes - centre)).mean(0) / (codes - centre).square().mean(0)
    # In float64: a solution in float32 depends, in its last bits, on where the arrays lie.
    told = ((codes - centre) * slope).double()
    readout = torch.linalg.lstsq(told, (vectors - mean).double()).solution.float()

    decoder.patch_embed.proj.weight.copy_(noisy.T)
    decoder.patch_embed.proj.bias.zero_()
    decoder.from_codes.weight.copy_(code.T)
    decoder.from_codes.bias.copy_(-code.T @ centre.view(levels, code_dim).mean(0))
    decoder.register_positions.copy_(table.flatten(0, 1)[place] + 8 * rank[level])
    # Masked tokens are at no place, so that they take no weight from those that are.
    reader = torch.cat([place_reader(table), nowhere])
    decoder.mask_token.copy_(14 * nowhere[0])
    decoder.null_token.copy_(-14 * nowhere[0])
    for number, block in enumerate(decoder.blocks):
        look_at_own_place(
            block.attn.qkv.weight, reader, config.head_dim, dim // config.head_dim // 2
        )
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.copy_(0.3 * rest.T @ (rest @ linear.weight))
        # Gates are open from the start, so that every block learns at once.
        block.adaln.bias.unflatten(0, (2, 6, -1))[:, :2] = 1.0 if number < 2 else 0.1
    mlp, attention = decoder.blocks[0].mlp, decoder.blocks[1].attn
    gates, inputs = mlp.fc1_fc3.weight.split(mlp.fc2.in_features)
    for index in range(components):
        gates[index] = rank[index // code_dim]
        inputs[index] = code[index % code_dim]
        mlp.fc2.weight[:, index] = 0.1 * slope[index] * content[index]
    attention.qkv.weight[2 * dim : 2 * dim + components] = content
    attention.proj.weight[:, :components] = content.T

    # What arrives at the patches is measured with two levels known: attention takes the mean over a
    # place, so that more of them count for less, which training mends; too much would be worse.
    count, patches = 256, len(place) // levels
    noise = torch.randn(count, config.latent_channels, config.latent_size, config.latent_size)
    known = min(2, levels) * patches
    drawn = codes.unflatten(1, (levels, code_dim))[
        torch.randint(len(codes), (count, known)), level[:known]
    ]
    arrived: list[Tensor] = []
    hook = decoder.proj.register_forward_pre_hook(lambda _, inputs: arrived.append(inputs[0]))
    decoder(noise, torch.ones(count), *decoder.condition(drawn))
    hook.remove()

    def gain(directions: Tensor, sent: Tensor) -> Tensor:
        """Of ``sent`` ``[count, patches, n]`` what is found along ``directions`` ``[n, D]``."""
        return (arrived[0] @ directions.T * sent).mean() / sent.square().mean()

    shown = min(2, levels) * code_dim
    said = (drawn - centre.view(levels, code_dim)[level[:known]]).unflatten(1, (-1, patches))
    said = said[:, :, place[:patches].argsort()].transpose(1, 2).flatten(2) * slope[:shown]
    through = gain(noisy, patch_vectors(decoder.patch_embed, noise))
    heard = gain(content[:shown], said)
    decoder.proj.weight.copy_(noisy / through - readout.T @ content / heard)
    decoder.proj.bias.copy_(-mean)
