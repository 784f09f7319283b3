"""`vac doctor`: measure this machine in a minute, and say what will hold a run back and which settings change that."""

from __future__ import annotations

from vac_ddp.arguments import parse_settings

ABOUT = "Measure this machine in a minute; say what will hold a run with these settings back, and what changes that."


def main(argv: list[str]) -> int:
    """`vac doctor [--config NAME] [group.name=value ...]`."""
    config = parse_settings(argv, program="vac doctor", about=ABOUT).config
    from vac_ddp.doctor.advice import advice, limits  # torch: only once the arguments are good
    from vac_ddp.doctor.examination import examine

    measured = examine(config, print)
    print("\nwith these settings, clips/s of this machine:")
    for name, rate in limits(measured).items():
        print(f"  {name:<26} {rate:.3g}")
    print()
    for line in [*advice(measured, config), *measured.notes]:
        print(line)
    return 0
