"""A decoding step by the TPU compiler's own count, and what it reads and copies: of the text of a
program that it compiled for v6e, decoding_program.txt, of which most attributes were cut out. 32
rows, six layers of two weights of 32 MiB each, `up` and `out`, the second by head: the compiler
copies its stack before the loop, and each layer's part of that at every step."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.sizes import config_of
from benchmarks.tpu_decoding import Rows, compile_step
from pvm_jax.sharding import make_mesh
from train.fit.decoding import PARTS, TokenTime
from train.step.compile_ahead import tpu_devices

ROOT = Path(__file__).parents[2]
TEXT = Path(__file__).with_name("decoding_program.txt").read_text()
V6E = "TPU v6 lite"
STACK, CACHE = 6 * 4096 * 4096 * 2, 6 * 32 * 256 * 128 * 2
OUT = "weights['out']"
COPIED = "%copy.4 = bf16[6,4096,4096]{1,2,0:T(8,128)(2,1)} copy(%weights__out__.1)"
"""Before the loop."""
LAYERS = "%constant.110 = s32[]{:T(128)} constant(6)"
"""As many as the loop over layers has."""


def test_a_step_reads_its_weights_and_both_ways_of_its_cache():
    token = TokenTime.of(TEXT, V6E)
    rest = token.once - (2 * STACK + CACHE)
    assert 0 <= rest < 2**10  # tokens and numbers
    assert 0 <= token.read - (token.once + CACHE) < 2**10  # for scores, and for what is seen
    assert token.floor == token.once / 1.64e12
    assert token.seconds > token.floor


def test_copies_of_weights_are_told_by_name_and_size():
    token = TokenTime.of(TEXT, V6E)
    assert token.copies_before == {OUT: STACK}
    assert token.copies == {OUT: STACK}
    assert COPIED in TEXT
    kept = TEXT.replace(COPIED, COPIED.replace(" copy(", " bitcast("))
    assert TokenTime.of(kept, V6E).copies_before == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LAYERS, LAYERS.replace("constant(6)", "parameter(1)"), r"loop while\.29: its condition"),
        ("ENTRY ", "", "it has no entry"),
        ("estimated_cycles", "cycles", "no estimate of the product"),
        (TEXT[-300:], "", "it ends within a computation"),
    ],
)
def test_what_is_not_understood_is_an_error(old, new, message):
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        TokenTime.of(TEXT.replace(old, new), V6E)


def test_a_program_without_the_loop_of_decoding_is_an_error():
    other = Path(__file__).with_name("compiled_program.txt").read_text()
    with pytest.raises(ValueError, match="no loop in it ends by what it has decoded"):
        TokenTime.of(other, V6E)


def test_parts_are_files_of_the_library():
    for file in PARTS:
        assert (ROOT / file).exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler"
)
@pytest.mark.parametrize("prompts", [1, 32])
def test_generation_copies_nothing_that_it_is_given(prompts):
    config = config_of("8b")
    text = replace(config.text, num_hidden_layers=6, pvm_layers=(2,))
    vision = replace(config.vision, deepstack_visual_indexes=(0,))
    mesh = make_mesh(1, 1, 1, devices=tpu_devices("v6e:2x2")[:1])
    compiled = compile_step(
        replace(config, text=text, vision=vision), mesh, Rows(prompts, 1, 1280, 1024, 256)
    )
    assert compiled.text is not None
    token = TokenTime.of(compiled.text, V6E)
    assert (token.copies, token.copies_before) == ({}, {})
    assert token.read < 1.001 * token.once
