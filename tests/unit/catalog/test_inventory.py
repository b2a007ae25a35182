"""What is on a machine: the hub's cache, our own folders, aliases; facts, drafts and verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_serving.catalog.aliases import ALIASES
from mlx_serving.catalog.architectures import modalities, supported
from mlx_serving.catalog.digests import check_digests, expected
from mlx_serving.catalog.facts import read_facts
from mlx_serving.catalog.health import Broken, Healthy, Machine
from mlx_serving.catalog.inventory import Entry, hub_cache, inventory, locate, places
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.progress import Silent
from mlx_serving.catalog.vocabulary import Candidate, drafts_for, vocabulary
from mlx_serving.errors import ModelNotFound
from model_folders import (
    DAMAGES,
    WEIGHTS,
    files,
    flip_last_byte,
    safetensors,
    write_folder,
    write_hub,
)

MACHINE = Machine(extras=frozenset(), model_bytes=1 << 30)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def by_name(entries: list[Entry]) -> dict[str, Entry]:
    return {entry.place.name: entry for entry in entries}


def test_every_kind_of_place_is_found(home: Path, cache: Path) -> None:
    write_folder(home / "models" / "mine")
    write_folder(home / "models" / ".mine.half")
    write_folder(home / "models" / "smollm2-135m")
    write_hub(cache, "org/one", files())
    write_hub(cache, "org/two", files(), commit="d" * 40, ref="v1")
    write_hub(cache, "org/three", files(), commit="e" * 40, ref="")
    write_hub(cache, "org/not-a-model", {"README.md": b"x"})
    found = [(place.name, place.source) for place in places(home, cache) if place.path]
    assert found == [
        ("smollm2-135m", "alias"),
        ("mine", "converted"),
        ("org/one", "hub"),
        (f"org/three@{'e' * 40}", "hub"),
        ("org/two@v1", "hub"),
    ]
    absent = [place.name for place in places(home, cache) if not place.path]
    assert absent == [name for name in ALIASES if name != "smollm2-135m"]
    assert locate("org/two@v1", home, cache).path is not None
    assert locate("mine", home, cache).source == "converted"
    for absent in ("org/four", "gemma3-270m", "nothing"):
        with pytest.raises(ModelNotFound):
            locate(absent, home, cache)


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_kind_of_damage_shows(home: Path, cache: Path, damage: str) -> None:
    do, _, named, how = DAMAGES[damage]
    model = write_hub(cache, "org/model", files())
    known = Known(home)
    assert check_digests(expected(model), known, "unread", Silent(), "x") == []
    assert by_name(inventory(home, cache, MACHINE))["org/model"].verdict == Healthy()
    do(model)
    entry = by_name(inventory(home, cache, MACHINE))["org/model"]
    assert entry.verdict is not None and not isinstance(entry.verdict, Healthy)
    assert named in str(entry.verdict) and how in str(entry.verdict)


def test_a_changed_file_is_read_again_and_a_mended_one_forgiven(home: Path, cache: Path) -> None:
    model = write_hub(cache, "org/model", files())
    known, wanted = Known(home), expected(model)
    assert set(wanted) == {model / WEIGHTS}
    flip_last_byte(model / WEIGHTS)
    # Nobody has read it yet, so nothing is known of it.
    assert check_digests(wanted, known, "changed", Silent(), "x") == []
    problems = check_digests(wanted, known, "unread", Silent(), "x")
    assert [(p.file, p.kind) for p in problems] == [(WEIGHTS, "wrong_hash")]
    assert check_digests(wanted, known, "changed", Silent(), "x") == problems
    flip_last_byte(model / WEIGHTS)
    assert check_digests(wanted, known, "changed", Silent(), "x") == []
    assert isinstance(by_name(inventory(home, cache, MACHINE))["org/model"].verdict, Healthy)


def test_facts_of_a_quantised_model(tmp_path: Path) -> None:
    weights = safetensors(
        **{
            "embed.weight": ("U32", (10, 16)),
            "embed.scales": ("F16", (10, 2)),
            "embed.biases": ("F16", (10, 2)),
            "fine.weight": ("U32", (10, 8)),
            "fine.scales": ("F16", (10, 2)),
            "fine.bias": ("F16", (10,)),
            "norm.weight": ("F16", (64,)),
        }
    )
    quantization = {"bits": 4, "group_size": 64, "fine": {"bits": 4, "group_size": 32}}
    contents = files(quantization=quantization) | {WEIGHTS: weights}
    contents["README.md"] = b"---\ntags: [x]\nlicense: apache-2.0\n---\n# Hello"
    facts = read_facts(write_folder(tmp_path / "m", contents), "m")
    assert facts.parameters == 10 * 128 + 10 * 64 + 10 + 64
    assert facts.licence == "apache-2.0"
    assert facts.disk_bytes == sum(map(len, contents.values()))
    assert facts.modalities == ("text",)


def test_a_licence_file_will_do(tmp_path: Path) -> None:
    contents = files() | {"LICENSE": b"    MIT License\n"}
    assert read_facts(write_folder(tmp_path / "m", contents), "m").licence == "mit"


@pytest.mark.parametrize(
    ("config", "beside", "expected_modalities"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, ("text",)),
        ({"architectures": ["XForConditionalGeneration"], "vision_config": {}}, None, ("text", "vision")),
        ({"vision_config": {}, "audio_config": {}}, None, ("text", "vision", "audio")),
        ({"architectures": ["BertModel"]}, None, ("embedding",)),
        ({"architectures": ["Qwen3ForCausalLM"]}, "modules.json", ("embedding",)),
    ],
)  # fmt: skip
def test_what_goes_in(
    tmp_path: Path, config: dict[str, object], beside: str | None, expected_modalities: object
) -> None:
    if beside:
        (tmp_path / beside).write_text("[]")
    assert modalities(config, tmp_path) == expected_modalities


def test_architectures_are_mlx_lms_own() -> None:
    from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

    for name in (*MODEL_REMAPPING, "llama", "gemma3", "scripted"):
        assert supported({"model_type": name}), name
    for kind, class_name in MODEL_ARCHITECTURE_REMAPPING:
        assert supported({"model_type": kind, "architectures": [class_name]})
    assert not supported({"model_type": "nobodys"})
    assert not supported({})


def test_drafts_have_the_same_vocabulary_and_are_much_smaller(home: Path, cache: Path) -> None:
    other = {"model": {"vocab": {"a": 1, "b": 0}}}
    write_hub(cache, "org/large", files(parameters=4000))
    write_hub(cache, "org/small", files(parameters=900))
    write_hub(cache, "org/tiny", files(parameters=100))
    write_hub(cache, "org/stranger", files(other, parameters=100))
    entries = by_name(inventory(home, cache, MACHINE))
    assert entries["org/large"].drafts == ("org/tiny", "org/small")
    assert entries["org/small"].drafts == ("org/tiny",)
    assert entries["org/tiny"].drafts == entries["org/stranger"].drafts == ()


def test_a_model_is_no_draft_of_its_own_size() -> None:
    large = Candidate("large", 400, "v")
    assert drafts_for(large, [large, Candidate("b", 101, "v"), Candidate("c", 100, "v")]) == ("c",)


def test_vocabularies_are_equal_by_their_ids(tmp_path: Path) -> None:
    known = Known(tmp_path / "home")
    texts = (
        '{"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}',
        '{"added_tokens": [], "model": {"vocab": {"b": 1, "a": 0}}}',
        '{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}',
        '{"model": {}}',
    )
    found = []
    for i, text in enumerate(texts):
        (tmp_path / str(i)).write_text(text)
        found.append(vocabulary(tmp_path / str(i), known))
    assert found[0] == found[1] is not None
    assert found[2] is not None and found[2] != found[0]
    assert found[3] is None
    (tmp_path / "0").write_text(texts[2])
    assert vocabulary(tmp_path / "0", known) == found[2]


def test_the_hubs_cache_is_where_its_client_has_it(tmp_path: Path) -> None:
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hub_cache({"HF_HOME": "/b"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"


def test_a_broken_config_is_listed_without_facts(home: Path, cache: Path) -> None:
    model = write_hub(cache, "org/model", files())
    (model / "config.json").resolve().write_text("{")
    entry = by_name(inventory(home, cache, MACHINE))["org/model"]
    assert entry.facts is None
    assert isinstance(entry.verdict, Broken)
    assert entry.disk_bytes > 0
