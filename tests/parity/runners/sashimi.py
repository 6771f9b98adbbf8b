"""The backbone in its three forms, all at once and sample by sample, and mu-law."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.sashimi import SaShiMiBackbone
from tessera.tokenizers.audio.sample_quantizer import SampleQuantizer
from tessera.weights.convert.sashimi import convert_state_dict
from tessera.weights.loading import load_strict


@torch.no_grad()
def backbone(case):
    c, args = case.config, case.args
    model = SaShiMiBackbone(
        dim=c["d_model"],
        depth=c["n_layers"],
        pool=c["pool"],
        expand=c["expand"],
        mlp_ratio=c["ff"],
        d_state=c["d_state"],
        mode={"s4d": "diagonal", "dplr": "dplr"}[args["mode"]],
        bidirectional=args["bidirectional"],
        unet=args["unet"],
    ).eval()
    config = {"pool": c["pool"], "depth": c["n_layers"], "unet": args["unet"]}
    load_strict(model, convert_state_dict(case.state(args["prefix"]), config))
    x = case.inputs["x"]
    y = model(x)
    if not args["unet"]:
        state = model.init_state(len(x))
        steps = torch.stack([model.step(x[:, t], state) for t in range(x.shape[1])], dim=1)
        torch.testing.assert_close(steps, y, atol=1e-4, rtol=1e-4)
    return {"y": y}


def mu_law(case):
    quantizer = SampleQuantizer(16000, case.args["bits"])
    index = quantizer.encode(case.inputs["audio"][None, None])
    return {"index": index[0, 0], "decoded": quantizer.decode(index)[0, 0]}


RUNNERS = {"mu_law": mu_law, "*": backbone}
