"""TokenBridge: dimension-wise quantizer."""

from __future__ import annotations

from tessera.tokenizers.quantizers.dimension_wise import DimensionWiseQuantizer, gaussian_levels


def build_quantizer(case):
    c = case.config
    quantizer = DimensionWiseQuantizer(
        c["quant_levels"], (c["quant_min"], c["quant_max"]), c["std_range"]
    )
    quantizer.reconstruction_values = case.state()["reconstruction_values"]
    return quantizer


def tables(case):
    boundaries, values = gaussian_levels(case.config["quant_levels"], case.config["std_range"])
    return {"reconstruction_values": values, "boundaries": boundaries}


def quantize(case):
    values, ids = build_quantizer(case)(case.inputs["latents"])
    return {"indices": ids.flatten(2).transpose(1, 2), "dequant": values}


RUNNERS = {"tables": tables, "quantize": quantize}
