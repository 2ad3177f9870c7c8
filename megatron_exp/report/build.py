"""`report`: from a run directory to one HTML file."""

from pathlib import Path
from typing import Any

import jinja2

from megatron_exp import __version__
from megatron_exp.display.page import page_environment
from megatron_exp.files import write_file
from megatron_exp.report.dependence import dependence_section
from megatron_exp.report.dynamics import dynamics_pictures
from megatron_exp.report.experiments import experiment_sections
from megatron_exp.report.gather import Inputs, gather
from megatron_exp.report.inserted import inserted_rows, placement_picture
from megatron_exp.report.methods import methods
from megatron_exp.report.overview import key_figures, scale_note, verdict_kind
from megatron_exp.report.provenance import citations, provenance
from megatron_exp.report.signatures import signatures


def report(
    run_dir: Path, against: Path | None, out: Path, show_text: bool = False, figures: Path | None = None, cpdt: Path | None = None
) -> Path:
    """Write the report of a run and return its path; an older report at `out` is replaced.

    Args:
        run_dir: RUN, finished or not (then the page is watermarked with its step), evaluated or not.
        against: the twin's run directory, or None.
        out: the HTML file.
        show_text: whether payload texts and what models wrote stand in the page. Else they are not in the file at all.
        figures: a directory for every plot as SVG and as PDF, or None.
        cpdt: a directory with the result of the dependence test, or None.

    Raises:
        UserError: where a part is missing or damaged, or run, twin, manifest and results do not belong together.
    """
    content = gathered(gather(run_dir, against), show_text=show_text, cpdt=cpdt)
    page = _environment().get_template("report.html.j2").render(content)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page.encode())
    if figures is not None:
        write_figures(content, Path(figures))
    return out


def render(inputs: Inputs, *, show_text: bool, cpdt: Path | None = None) -> str:
    """The page as text."""
    return _environment().get_template("report.html.j2").render(gathered(inputs, show_text=show_text, cpdt=cpdt))


def gathered(inputs: Inputs, *, show_text: bool, cpdt: Path | None = None) -> dict[str, Any]:
    """Everything that the page shows."""
    dependence = dependence_section(cpdt, inputs.manifest)
    return {
        "page_title": f"{inputs.run.name}: report",
        "version": __version__,
        "run": inputs.run,
        "finished": inputs.finished,
        "last_step": inputs.last_step,
        "has_twin": inputs.twin is not None,
        "evaluated": inputs.results.file is not None,
        "key_figures": key_figures(inputs),
        "scale_note": scale_note(inputs),
        "inserted": inserted_rows(inputs),
        "budget": inputs.manifest.record["budget"],
        "placement": placement_picture(inputs),
        "dynamics": dynamics_pictures(inputs),
        "experiments": experiment_sections(inputs, show_text=show_text),
        "dependence": dependence,
        "signatures": signatures(inputs, dependence),
        "methods": methods(inputs),
        "provenance": provenance(inputs),
        "citations": citations(inputs),
    }


def write_figures(content: dict[str, Any], directory: Path) -> list[Path]:
    """Every plot of the page as NAME.svg and NAME.pdf; names say the section and the place in it."""
    named = [("placement", content["placement"])] if content["placement"] else []
    named += [(f"dynamics-{number}", one) for number, one in enumerate(content["dynamics"], start=1)]
    for section in content["experiments"]:
        named += [(f"{section.name}-{number}", one) for number, one in enumerate(section.pictures, start=1)]
    if content["dependence"] and content["dependence"].picture:
        named.append(("dependence", content["dependence"].picture))
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in named:
        for suffix, data in ((".svg", picture.svg.encode()), (".pdf", picture.pdf())):
            written.append(directory / f"{name}{suffix}")
            write_file(written[-1], data)
    return written


def _environment() -> jinja2.Environment:
    environment = page_environment("megatron_exp.report")
    environment.filters["verdict_kind"] = verdict_kind
    return environment
