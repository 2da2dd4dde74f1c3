"""The demo: a tiny Qwen3-VL, the task that it is trained on, and the measurement of what it sees
over a long answer."""
