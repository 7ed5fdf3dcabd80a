"""What a check of an adapter package gives back: findings, and the verdict that follows from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry

MAX_FINDINGS_PER_RULE = 40
# Rules that are broken because another one is, and what to look for: in the same file, or in the metadata,
# whose geometry the weights are checked against. The first that is found is the cause.
_WALK_STOPS = ("C1", "C2", "C4", "C5", "C6", "C9", "C14")
_NO_GEOMETRY = ("P2", "M1", "G2")
_CAUSES = {
    "M8": ("M5",),
    "M9": ("G2",),
    "C7": ("C8",),
    "C5": ("C8", "C7"),
    "A1": (*_NO_GEOMETRY, *_WALK_STOPS),
    "A3": (*_NO_GEOMETRY, "C10"),
    "A7": (*_NO_GEOMETRY, *(f"C{number}" for number in range(1, 15)), "A1", "A2", "A3"),
}
_METADATA = "metadata.json"


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: its id.
        severity: "fail" or "warning".
        message: what is wrong, in words.
        file: the file it was found in; "" for the folder.
        cause: the broken rule that this one follows from, or "".
    """

    rule: str
    severity: str
    message: str
    file: str
    cause: str = ""


@dataclass(frozen=True)
class PackageReport:
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
    def broken(self) -> tuple[str, ...]:
        """The rules that failed, sorted, without those that only follow from another."""
        return tuple(sorted({f.rule for f in self.findings if f.severity == "fail" and not f.cause}))

    @property
    def fits_device(self) -> bool:
        """True if a device with this base model would take the package."""
        return self.ok and self.geometry == APPLE_GEOMETRY

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "package": str(self.package),
            "ok": self.ok,
            "broken": list(self.broken),
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
        return tuple(_with_cause(finding, self.kept) for finding in (*self.kept, *more))


def _with_cause(finding: Finding, found: list[Finding]) -> Finding:
    causes = _CAUSES.get(finding.rule.rpartition("-")[2], ())
    if finding.severity != "fail" or not causes:
        return finding
    places = {finding.file, _METADATA}
    others = {f.rule.rpartition("-")[2]: f.rule for f in found if f.severity == "fail" and f.file in places}
    return replace(finding, cause=next((others[rule] for rule in causes if rule in others), ""))


def shown(value: object) -> str:
    """A value as text that can be printed, whatever it holds, and is not long."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."
