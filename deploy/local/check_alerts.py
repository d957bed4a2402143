"""What `make check` says of alerts/: the real promtool and amtool read it, and find nothing.

One line for each of the four checks; where one finds something, what it found and status 1.
"""

import subprocess
import sys
from pathlib import Path

from deploy.local.debian import DebianError, binary

ALERTS = Path(__file__).resolve().parents[2] / "alerts"


def commands() -> dict[str, list[str]]:
    """What is checked -> the command that checks it, with a status other than 0 on a finding."""
    promtool, amtool = str(binary("promtool")), str(binary("amtool"))
    rules = [str(path) for path in sorted(ALERTS.glob("*.rules.yaml"))]
    tests = [str(path) for path in sorted(ALERTS.glob("tests/*.test.yaml"))]
    return {
        f"{len(rules)} rule files": [promtool, "check", "rules", "--lint-fatal", *rules],
        f"{len(tests)} files of rule tests": [promtool, "test", "rules", *tests],
        "the Prometheus configuration": [
            promtool, "check", "config", "--lint-fatal", str(ALERTS / "prometheus.yml")
        ],
        "the Alertmanager route": [amtool, "check-config", str(ALERTS / "alertmanager.yml")],
    }  # fmt: skip


def main() -> int:
    """Run the checks; the exit status."""
    try:
        checks = commands()
    except DebianError as error:
        print(f"alerts: not checked: {error}", file=sys.stderr)
        return 1
    failed = False
    for what, command in checks.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            print(f"alerts: {what}: ok")
        else:
            failed = True
            print(f"alerts: {what}:\n{done.stdout}{done.stderr}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
