"""Evaluated folders as pages: a report of one or several, and what two of them differ in."""

from pixart.evaluation.report.writing import write_report

__all__ = ["write_report"]
