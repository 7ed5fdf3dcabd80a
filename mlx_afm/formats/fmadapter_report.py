"""What a check of an adapter package gives back: findings, and the verdict that follows from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry

MAX_FINDINGS_PER_RULE = 40


@dataclass(frozen=True)
class Finding:
    """One broken rule: its id, "fail" or "warning", what is wrong in words, and the file it was found in."""

    rule: str
    severity: str
    message: str
    file: str


@dataclass(frozen=True)
class Report:
    """What `check_fmadapter` found.

    Attributes:
        package: the folder.
        geometry: the sizes it was checked against.
        findings: in the order of the files; at most `MAX_FINDINGS_PER_RULE` of one rule, and one that counts the rest.
    """

    package: Path
    geometry: Geometry
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if no rule failed; there may be warnings."""
        return all(finding.severity != "fail" for finding in self.findings)

    @property
    def fits_device(self) -> bool:
        """True if a device with this base model would take the package."""
        return self.ok and self.geometry == APPLE_GEOMETRY

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "package": str(self.package),
            "ok": self.ok,
            "fits_device": self.fits_device,
            "geometry": asdict(self.geometry),
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass
class Findings:
    """Collects findings, and keeps a hostile file from making millions of them."""

    kept: list[Finding] = field(default_factory=list)
    seen: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def fail(self, rule: str, message: str, file: str = "") -> None:
        """Adds a broken rule that keeps the package from working."""
        self._add(rule, "fail", message, file)

    def warn(self, rule: str, message: str, file: str = "") -> None:
        """Adds a broken rule that a device overlooks."""
        self._add(rule, "warning", message, file)

    def _add(self, rule: str, severity: str, message: str, file: str) -> None:
        self.seen[rule, severity, file] += 1
        if self.seen[rule, severity, file] <= MAX_FINDINGS_PER_RULE:
            self.kept.append(Finding(rule, severity, message, file))

    def all(self) -> tuple[Finding, ...]:
        """What was kept, and per rule a count of what was not."""
        more = [
            Finding(rule, severity, f"... and {count - MAX_FINDINGS_PER_RULE} more of this kind", file)
            for (rule, severity, file), count in self.seen.items()
            if count > MAX_FINDINGS_PER_RULE
        ]
        return (*self.kept, *more)
