#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the PrometheusRule of the rules:   python3 packaging/kubernetes/rules.py

It has the groups of packaging/prometheus as they are, below what the Prometheus Operator asks for. A test holds both
together.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["TARGET", "prometheus_rule"]

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "packaging/prometheus/ksmd-ctl.rules.yml"
TARGET = ROOT / "packaging/kubernetes/components/prometheus-operator/prometheusrule.yaml"

_HEAD = """\
# Made from the rules for Prometheus, ksmd-ctl.rules.yml, by rules.py of the source tree.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ksmd-ctl
  namespace: ksmd-ctl
  labels:
    app.kubernetes.io/name: ksmd-ctl
spec:
"""


def prometheus_rule(rules: str) -> str:
    """The manifest of a file of rules, which begins with comments and has one key, ``groups``."""
    lines = rules.splitlines()
    begin = lines.index("groups:")
    return _HEAD + "".join(f"  {line}".rstrip() + "\n" for line in lines[begin:])


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule(SOURCE.read_text()))
