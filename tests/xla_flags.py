"""The XLA flags of the tests, all of them, and of the processes that tests start."""

import json
import os
import subprocess
import sys

DEVICES = "--xla_force_host_platform_device_count="

_WANTED = {
    # Programs here compile far longer than they run.
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,  # 32 parts, each with a cost of its own
    "xla_cpu_use_fusion_emitters": False,  # gone in jaxlib 0.12
    # Or else simulated devices may run a program's independent loops in different orders, and wait
    # in them for each other for ever.
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}

# XLA ends a process whose XLA_FLAGS it does not know; of an option of one compilation it says so.
_PROBE = """
import json, sys
import jax

known = {}
for name, value in json.loads(sys.argv[1]).items():
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
        known[name] = value
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
print(json.dumps(known))
"""


def xla_flags(devices: int = 8) -> str:
    """XLA_FLAGS as they are, with those above that this jaxlib knows, for `devices` simulated
    devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROBE, json.dumps(_WANTED)]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    known = [f"--{name}={json.dumps(value)}" for name, value in json.loads(found.stdout).items()]
    return " ".join([os.environ.get("XLA_FLAGS", ""), *known, f"{DEVICES}{devices}"]).strip()
