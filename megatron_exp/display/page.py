"""Self-contained HTML pages: what the report and the inspector have in common, above all that texts from data stay text."""

from typing import Any

import jinja2

from megatron_exp.display import numbers
from megatron_exp.display.visible import visible


def page_environment(package: str) -> jinja2.Environment:
    """The templates of a package beside the shared ones: autoescape everywhere, and every value is made visible before it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("megatron_exp.display")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "count": numbers.count,
        "measured": numbers.measured,
        "signed": numbers.signed,
        "percent": numbers.percent,
        "probability": numbers.probability,
    }
    environment.globals |= {"interval": numbers.interval, "is_number": numbers.is_number}
    return environment


def _finalize(value: Any) -> Any:
    """Applied to every printed expression: strings lose their control characters, whatever the template forgot."""
    return visible(value) if type(value) is str else value
