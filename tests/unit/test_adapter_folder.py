from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.adapter_folder import (
    AdapterSettings,
    BadAdapter,
    LayerTensors,
    is_adapter,
    layers,
    read_settings,
)

MLX_LM = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}
PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def settings(folder: Path, **config: Any) -> AdapterSettings:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_settings(folder)


def test_who_wrote_it_and_its_scale(tmp_path: Path) -> None:
    own = settings(tmp_path, **MLX_LM)
    assert (own.file, own.dora, own.scale("any", 8)) == ("adapters.safetensors", False, 20.0)
    assert is_adapter(tmp_path)
    # An older mlx-lm names no type.
    older = {"lora_parameters": {"scale": 20.0}}
    assert settings(tmp_path, **older) == AdapterSettings(False, False, older)
    assert settings(tmp_path, **older, fine_tune_type="dora").dora
    peft = settings(tmp_path, **PEFT)
    assert (peft.file, peft.scale("any", 8)) == ("adapter_model.safetensors", 2.0)
    assert settings(tmp_path, **PEFT, use_rslora=True).scale("any", 16) == 4.0
    of_each = settings(tmp_path, **PEFT, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 2})
    assert of_each.scale("layers.0.v_proj", 4) == 0.5 and of_each.scale("layers.0.q_proj", 8) == 2.0
    (tmp_path / "config.json").write_text("{}")
    assert not is_adapter(tmp_path)


def test_names_of_either_kind(tmp_path: Path) -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    own = settings(tmp_path, **MLX_LM)
    names = [f"{layer}.{part}" for layer in (q, v) for part in ("lora_a", "lora_b")]
    assert layers(own, names) == {
        layer: LayerTensors(f"{layer}.lora_a", f"{layer}.lora_b") for layer in (q, v)
    }
    peft = settings(tmp_path, **PEFT, use_dora=True)
    for end in ("", ".weight", ".default", ".default.weight"):
        parts = [f"base_model.model.{q}.lora_{p}{end}" for p in ("A", "B", "magnitude_vector")]
        assert layers(peft, parts) == {q: LayerTensors(*parts)}


@pytest.mark.parametrize(
    ("config", "kind", "detail"),
    [
        ({"fine_tune_type": "full"}, "unsupported", "fine_tune_type is 'full'"),
        ({"fine_tune_type": "lora"}, "bad_json", "has no lora_parameters with a scale"),
        ({"lora_parameters": {"alpha": 16}}, "bad_json", "has no lora_parameters with a scale"),
        ({"peft_type": "IA3"}, "unsupported", "peft_type is 'IA3'"),
        ({"peft_type": "LORA"}, "bad_json", "has no lora_alpha"),
        (PEFT | {"bias": "all"}, "unsupported", "biases"),
        (PEFT | {"modules_to_save": ["lm_head"]}, "unsupported", "modules_to_save"),
    ],
)
def test_what_does_not_run_is_named(
    tmp_path: Path, config: dict[str, Any], kind: str, detail: str
) -> None:
    with pytest.raises(BadAdapter) as refused:
        settings(tmp_path, **config)
    assert (refused.value.file, refused.value.kind) == ("adapter_config.json", kind)
    assert detail in refused.value.detail


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_settings_that_are_no_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadAdapter) as refused:
        read_settings(tmp_path)
    assert refused.value.kind == "missing"
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(BadAdapter) as refused:
        read_settings(tmp_path)
    assert refused.value.kind == "bad_json"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ([], "mismatch"),
        (["l.lora_a"], "mismatch"),
        (["l.lora_a", "l.lora_b", "l.m"], "mismatch"),
        (["l.lora_a", "l.lora_b", "l.weight"], "unsupported"),
    ],
)
def test_tensors_that_do_not_belong(tmp_path: Path, names: list[str], kind: str) -> None:
    with pytest.raises(BadAdapter) as refused:
        layers(settings(tmp_path, **MLX_LM), names)
    assert refused.value.kind == kind
    with pytest.raises(BadAdapter):
        layers(settings(tmp_path, **PEFT), ["base_model.model.e.lora_embedding_A"])
