"""benchmarks.tpu_attention reads libtpu's schedules of kernels."""

import numpy as np
import pytest

from benchmarks.tpu_attention import KernelCost, cost

SCHEDULE = """\
     0   :  { %s1 = inlined_call_operand.vmem [shape: bf16[2,256,128], index: 0] }
   0x10 LB: > { %s2 = sphi %s3 }
   0x12   : > { %26 = sbr.rel (%p1) target = $region44 } /* Start region 43 */
   0x14   : > { %27 = dma.general %s5 }
   0x16   : > { %28 = vld [vmem:[%s6]] }
   0x18   : > { %29 = sbr.rel (%p2) target = $region56 } /* Start region 55 */
{fill}
   0x30 PF: > { %s7 = sld [smem:[%s8]] } /* Start/End empty region 56 :: Start region 57 */
   0x32   : > { %30 = sbr.rel (%p4) target = $region60 }
{block}
   0x90   : > { %v9 = vmatmul.bf16.gmra.mxu0 %v8 }
   0xa0 PF: > { %s9 = sld [smem:[%s8]] } /* Start/End empty region 60 */
   0xa8 PF: > { %s9 = sld [smem:[%s8]] } /* Start/End empty region 44 */
   0xb0   : > { %43 = sbr.rel (!%p5) target = $region167 }
"""


def _stores(start: int) -> str:
    return "\n".join(f"   {hex(start + i)}   : > {{ %9 = vst [vmem:[%s1]] %v1 }}" for i in range(9))


def test_a_schedule_is_counted_by_region():
    text = SCHEDULE.replace("{fill}", _stores(0x20)).replace("{block}", _stores(0x40))
    block, line = 0xA0 - 0x32, 0x30 - 0x18
    one = cost(text)
    assert one == KernelCost(block, 0xB0 - 0x10 - block - line, line)
    meet = np.array([[[1, 0, 0], [1, 1, 0]]], bool)
    assert one.of(meet, of_keys=False) == 3 * one.block + 6 * one.step + 2 * one.line
    assert one.of(meet, of_keys=True) == 3 * one.block + 6 * one.step + 3 * one.line


@pytest.mark.parametrize("word", ["LB", "vmatmul", "sbr.rel"])
def test_another_schedule_is_refused(word):
    text = SCHEDULE.replace("{fill}", _stores(0x20)).replace("{block}", _stores(0x40))
    with pytest.raises(ValueError, match="not understood: a kernel's schedule"):
        cost(text.replace(word, "??"))
