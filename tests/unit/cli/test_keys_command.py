from __future__ import annotations

import io
import json

import yaml

from mlx_serving.cli import keys
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say
from mlx_serving.secret import hashed


def test_a_key_is_printed_with_its_hash_and_entry() -> None:
    err = io.StringIO()
    assert keys.new("ci", Say(err=err)) == Exit.OK
    lines = err.getvalue().splitlines()
    key, digest = lines[0].split()[1], lines[1].split()[1]
    assert hashed(key) == digest
    entry = yaml.safe_load("\n".join(lines[-2:]))
    assert entry == [{"name": "ci", "hash": digest}]


def test_as_json() -> None:
    out = io.StringIO()
    assert keys.new("ci", Say(as_json=True, out=out)) == Exit.OK
    said = json.loads(out.getvalue())
    assert said["hash"] == hashed(said["key"])


def test_a_name_that_no_entry_could_have() -> None:
    assert keys.new("a b", Say(err=io.StringIO())) == Exit.USAGE
