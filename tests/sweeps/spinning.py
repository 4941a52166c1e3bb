"""The life of test_nursery's trials: a nursery loads it, and it loads next to nothing."""

import resource
from typing import Any


def body(spec: dict[str, Any], call: Any) -> dict[str, Any]:
    while spec["spins"]:
        pass
    return {"limits": resource.getrlimit(resource.RLIMIT_CPU)}
