"""Write the page of a run anew: one HTML file that works offline.

in2core report runs/mine
"""

from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import ReportArguments


PARSER = RecipeParser("report", ReportArguments, __doc__, model=False, training=False)


def main(settings: Settings) -> None:
    """Write the page."""
    from hf_in2core.report.page import write_report

    args: ReportArguments = settings.arguments
    page = write_report(args.run or "", args.output)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
