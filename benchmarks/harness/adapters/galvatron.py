"""Galvatron's runtime."""

from __future__ import annotations

from autopart.compile.bench.setting import NotExpressibleError, Setting, Step


def build(setting: Setting) -> tuple[Step, str]:
    """Galvatron's hybrid-parallel models; raises ImportError or NotExpressibleError where they cannot run."""
    import galvatron.core.runtime  # noqa: F401

    raise NotExpressibleError(
        "Galvatron trains the models of its own model zoo from its own profiles, not a given nn.Module; "
        "its planner's choice is among the uniform configurations here"
    )
