"""The report: one HTML file that a person reads without the code, without a network and without a server.

    run directory + twin + manifest --gather--> Inputs --overview, inserted, dynamics, effects--> sections --page--> HTML

Everything that comes from data (names, conditions, texts) is escaped twice: control and bidirectional characters become visible
(`megatron_exp.display.visible`), then the template engine escapes the markup. Texts are left out unless asked for.
"""

from megatron_exp.report.build import report

__all__ = ["report"]
