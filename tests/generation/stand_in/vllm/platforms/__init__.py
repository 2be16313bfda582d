"""Where vLLM runs: here always on a CPU."""

from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: True)
