"""Write the page of a run anew: one HTML file that works offline.

in2core report runs/mine
"""

import sys

from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import ReportArguments


def make_parser() -> RecipeParser:
    """Parser of this command."""
    return RecipeParser("report", ReportArguments, __doc__, model=False, training=False)


def main(settings: Settings) -> None:
    """Write the page; exit code 1 where there is no run to show."""
    from hf_in2core.report.run import ReportError
    from hf_in2core.report.terminal import write_report

    args: ReportArguments = settings.arguments
    try:
        page = write_report(args.run or "", args.output)
    except (ReportError, OSError) as error:
        print(f"in2core report: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
