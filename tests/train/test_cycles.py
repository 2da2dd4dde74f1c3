"""Seconds by the TPU compiler's own count, read from the text of a program that it compiled:
compiled_program.txt, for v5e:2x2, of which layouts and most attributes were cut out. Two rounds of
three layers, [512, 1024] x [1024, 1024] on a chip, and of a branch, x [1024, 2048]."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from train.fit.cycles import CHIPS, PARTS, Row, StepTime, arriving_bytes, kernel_flops
from train.fit.footprint import Footprint
from train.fit.hlo import Hlo, Instruction, bytes_of, flops
from train.fit.schedule import Schedule

ROOT = Path(__file__).parents[2]
TEXT = Path(__file__).with_name("compiled_program.txt").read_text()
V5E = "TPU v5 lite"
LAYER = 2 * 512 * 1024 * 1024
HEAD = 2 * 512 * 1024 * 2048
STEP = "%constant.24.clone.1..sunk.1..sunk = s32[] constant(1)"


def instruction(line: str) -> Instruction:
    """A line of a program, as `Hlo.parse` reads it."""
    text = f"HloModule m, is_scheduled=true\n\nENTRY %main () -> f32[] {{\n  ROOT {line}\n}}\n"
    return Hlo.parse(text).computations["main"].root


def test_cycles_count_as_often_as_loops_and_branches_run():
    estimate = StepTime.of(TEXT, V5E)
    layer, taken, branch = 5206 + 6336 + 12636, 8596, 21340 + 1826
    assert estimate.total == Row(
        cycles=2 * (taken + 3 * layer + branch),
        copies=2 * (taken + 3 * (5206 + 6336)),
        converts=0,
        flops=2 * (3 * LAYER + HEAD),
    )
    assert estimate.outside == estimate.total.cycles / 1.5e9
    assert not estimate.silent
    assert StepTime.of(TEXT, V5E, times=4).total.cycles == 4 * estimate.total.cycles


def test_a_counter_may_take_several_steps_at_once():
    assert STEP in TEXT  # of the layers' loop, as in the compiler's rings of partial products
    assert StepTime.of(TEXT.replace(STEP, STEP[:-2] + "2)"), V5E).total.flops == 2 * (
        2 * LAYER + HEAD
    )
    with pytest.raises(ValueError, match=r"loop while\.24: its condition does not tell its trip"):
        StepTime.of(TEXT.replace(STEP, STEP[:-2] + "0)"), V5E)


def test_links_carry_what_a_chip_does_not_have():
    traffic = StepTime.of(TEXT, V5E).traffic
    gathered = 2 * (3 * 1024 * 1024 + 2048 * 1024) * 2  # bytes of bfloat16
    assert (traffic["all-gather"].bytes, traffic["all-gather"].hidden) == (gathered * 3 / 4, 0)
    assert traffic["all-reduce"].bytes == 2 * 4 * 2 * 3 / 4


@pytest.mark.parametrize(
    ("line", "received"),
    [
        ("%a = bf16[64,8] reduce-scatter(%x), replica_groups={{0,1},{2,3}}, to_apply=%f", 1024),
        ("%a = bf16[64,8] all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%f", 2 * 768),
        ("%a = bf16[64,8] all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 896),
        ("%a = (bf16[8,8], bf16[64,8], u32[], u32[]) collective-permute-start(%x)", 1032),
    ],
)
def test_bytes_that_reach_a_chip(line, received):
    assert arriving_bytes(instruction(line)) == received


def test_parts_and_stages_come_from_the_lines_of_python():
    decoder = TEXT.replace('"sample.py"', '"/anywhere/pvm_jax/model/decoder.py"')
    assert set(StepTime.of(TEXT, V5E).rows) == {("rest", "forward")}
    assert set(StepTime.of(decoder, V5E).rows) == {("decoder", "forward")}
    backward = decoder.replace("closed_call/while/body", "transpose(jvp())/while/body")
    again = backward.replace("transpose(jvp())/while", "transpose(jvp())/rematted_computation")
    assert StepTime.of(backward, V5E).rows["decoder", "backward"].flops == 6 * LAYER
    assert StepTime.of(again, V5E).rows["decoder", "recomputed"].flops == 6 * LAYER
    for file in PARTS:
        assert (ROOT / file).exists() or file == "/optax/"


def test_a_product_with_a_batch_counts_no_empty_places_of_its_window():
    product = instruction(
        "%c = bf16[3,32,64] convolution(%x, %y), window={size=3 stride=2 lhs_dilate=3},"
        " dim_labels=0bf_0oi->0bf"
    )
    assert flops(product, [3, 32, 128], [3, 64, 128]) == 2 * 3 * 32 * 64 * 128
    product = instruction(
        "%c = bf16[128,4,16] convolution(%x, %y), window={size=4 pad=3_3 rhs_reversal=1},"
        " dim_labels=bf0_0oi->b0f"
    )
    assert flops(product, [128, 64, 1], [4, 16, 64]) == 2 * 4 * 128 * 64 * 16
    product = instruction(
        "%c = f32[8,16] dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )
    assert flops(product, [8, 32], [32, 16]) == 2 * 8 * 16 * 32


def kernel(name: str, listed: str, *more: str, layout: int = 1) -> Instruction:
    """Of two rows of 8,192 columns."""
    sizes = "16384,128" if layout == 1 else "128,16384"
    arrays = [
        *(kind + listed for kind in ("s16", "s8")),
        *(f"bf16[{heads},{sizes}]{{2,1,0}}" for heads in (32, 8, 8)),
        "s32[16384,128]{1,0}",
        "s32[8,16384]{1,0}",
        *more,
    ]
    layouts = ", ".join(f'\\"{of}_layout\\": {layout}' for of in "qkv")
    sides = f'{{\\"block_q_dq\\": 512, \\"block_kv_dq\\": 256, {layouts}}}'
    return instruction(
        f'%{name} = bf16[32,16384,128] custom-call(%q), custom_call_target="tpu_custom_call",'
        f" operand_layout_constraints={{{', '.join(arrays)}}},"
        f' frontend_attributes={{kernel_metadata={{"xprof_metadata":"{sides}"}}}}'
    )


def test_kernels_compute_blocks():
    product = 2 * 2 * 32 * 8192 * 8192 * 128
    of_queries, of_keys = "[1,32,32]{2,1,0}", "[1,16,64]{2,1,0}"
    assert kernel_flops(kernel("splash_mha_fwd_segmented.2", of_queries)) == 2 * product
    assert kernel_flops(kernel("splash_mha_dq_segmented.2", of_queries)) == 3 * product
    causal = kernel(
        "splash_mha_dkv_segmented.2", of_keys, "f32[32,8,16384]{2,1,0}", "s32[8,16384]{1,0}"
    )
    assert kernel_flops(causal) == 4 * product * 17 / 32  # 272 of 512 blocks
    by_column = kernel("splash_mha_fwd_segmented.2", of_queries, layout=2)
    assert kernel_flops(by_column) == 2 * product
    with pytest.raises(ValueError, match=r"kernel other\.1 is not known"):
        kernel_flops(kernel("other.1", of_queries))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("is_scheduled=true", "", "it is of no scheduled program"),
        ("ENTRY ", "", "it has no entry"),
        ("direction=LT", "direction=NE", "does not tell its trip count"),
        ("estimated_cycles", "cycles", r"no estimate of the product fusion\.16"),
        (TEXT[-300:], "", "it ends within a computation"),
        ("replica_groups=", "groups=", r"all-gather.*without replica_groups"),
    ],
)
def test_what_is_not_understood_is_an_error(old, new, message):
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        StepTime.of(TEXT.replace(old, new), V5E)


def test_other_chips_and_sizes_are_not_guessed():
    with pytest.raises(ValueError, match="no clock of 'NVIDIA H100' is known"):
        StepTime.of(TEXT, "NVIDIA H100")
    with pytest.raises(ValueError, match="no size of 'f4x' is known"):
        bytes_of("(f32[2], f4x[2,2])")
    assert bytes_of("(f32[2]{0:T(128)}, pred[], /*index=5*/bf16[2,2])") == 17


def test_the_clocks_are_those_of_the_peaks():
    for kind, chip in CHIPS.items():  # 4 or 8 arrays of 128 x 128, or 4 of 256 x 256
        multipliers = StepTime.of(TEXT, kind).peak / 2 / chip.clock
        assert round(multipliers / 2**14) in (4, 8, 16)


def test_a_footprint_tells_the_time_where_a_tpu_compiler_counted():
    device = SimpleNamespace(platform="tpu", device_kind=V5E)
    mesh: Any = SimpleNamespace(devices=np.array([device]))
    given: dict[str, Any] = {field.name: 0 for field in fields(Footprint)}
    footprint = Footprint(**given | {"mesh": mesh, "program": TEXT, "runs": 4})
    table, *lines = map(str, footprint.time())
    assert "Table" in table
    assert lines[-1].startswith("a step would take 0.0 s or more with such rows: the")
    assert "all-gather 0.1 GiB" in lines[1]
    assert replace(footprint, program=None).time() == []
    device.platform = "gpu"
    assert footprint.time() == []


def test_a_loop_that_passes_a_number_on_is_seen_through():
    schedule = Schedule(Hlo.parse(TEXT))
    assert {turn.times for turn in schedule.turns()} == {1, 2, 6}
    limit = (
        TEXT.replace("  %constant.11.clone.1 = s32[] constant(3)\n", "")
        .replace(
            "(%get-tuple-element.86, %constant.11.clone.1)",
            "(%get-tuple-element.86, %get-tuple-element.87)",
        )
        .replace(
            "  %get-tuple-element.86 =",
            "  %get-tuple-element.87 = s32[] get-tuple-element(%wide.param.1), index=3\n"
            "  %get-tuple-element.86 =",
        )
    )
    assert {turn.times for turn in Schedule(Hlo.parse(limit)).turns()} == {1, 2}
