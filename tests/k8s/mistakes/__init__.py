"""Mistakes to plant into rendered overlays, by what finds them."""

from __future__ import annotations
