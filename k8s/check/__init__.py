"""What is wrong with rendered manifests, before a cluster is asked: schemas, the operators' own rules, what must fit."""

from k8s.check.documents import Documents, render
from k8s.check.finding import Finding
from k8s.check.rules import check

__all__ = ["Documents", "Finding", "check", "render"]
