"""Annotators: the pictures that ControlNets are led by, made from any picture.

    lines = annotate("canny", photograph, Size(1024, 1024), low=80)

Lines, edges and depth are white (or near) on black, as the networks were trained. docs/guide/annotators.md says which
kind is for which network.
"""

from __future__ import annotations

from calotype.control.annotators.kinds import ANNOTATORS, Annotator, annotate, annotator, check, drawn_by

__all__ = ["ANNOTATORS", "Annotator", "annotate", "annotator", "check", "drawn_by"]
