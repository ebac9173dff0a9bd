#!/usr/bin/env python3
"""Report on runs: tables, figures and plain sentences, as report.md and a self-contained report.html.

  python3 report.py runs/paths                     a path study, finished or not
  python3 report.py runs/answer                    ways to train a student over several seeds: do assistants help?
  python3 report.py runs/sweep runs/nni-ID         searches by sweep.py and NNI: their settings, ranked
  python3 report.py runs results/*.jsonl --output board       any runs: a leaderboard, and the studies among them
  python3 report.py runs/paths --keep results/paths.jsonl     their records as one file, for later reports
  python3 report.py results/paths.jsonl --table plane2     prints one table as Markdown

Reads what train.py recorded (config.json, metrics.jsonl, summary.json); neither torch nor weights are needed.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import sys
from pathlib import Path

from takd import files
from takd.config import flags
from takd.config.flags import number
from takd.errors import UserError
from takd.study import arms, collect, pairs, ranking
from takd.study.document import Document


def build_parser() -> flags.Parser:
    parser = flags.Parser(__doc__)
    parser.group.add_argument(
        "runs", nargs="+", metavar="RUNS", help="folders with runs, at any depth, or .jsonl files made by --keep"
    )
    parser.flag("--output", metavar="DIR", help="the report's folder (default: the first of RUNS, or beside a file)")
    price = number(float, minimum=0, maximum=10**6)
    parser.flag("--price-per-hour", type=price, metavar="N", help="machine price, to report costs")
    parser.flag("--keep", metavar="FILE", help="write the runs' records to this .jsonl file, and no report")
    about = "print the finished runs (of these networks) as one Markdown table, and write no report"
    parser.flag("--table", nargs="*", type=flags.network, metavar="NETWORK", help=about)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        values = {"--keep": args.keep, "--table": args.table is not None, "--output": args.output}
        given = [flag for flag, value in (values | {"--price-per-hour": args.price_per_hour}).items() if value]
        if len(given) > 1 and given[0] in ("--keep", "--table"):
            raise UserError(f"{given[0]} writes no report: {given[1]} has no effect; leave one out")
        if args.keep:
            files.check_folder(Path(args.keep).parent, "--keep")
            if Path(args.keep).suffix != ".jsonl" or (Path(args.keep).exists() and not Path(args.keep).is_file()):
                raise UserError(f"--keep {args.keep}: give a file whose name ends in .jsonl")
        elif args.output:
            files.check_folder(args.output, "--output")
        found = collect.collect(args.runs)
        runs = list(found.runs.values())
        if not runs:
            damaged = f" ({len(found.unreadable)} cannot be read: {found.unreadable[0]})" if found.unreadable else ""
            wanted = "a folder that train.py or distill_paths.py wrote to"
            raise UserError(f"no runs of train.py in {' '.join(args.runs)}{damaged}; give {wanted}")
        for line in found.unreadable:
            print(f"warning: left out {line}", file=sys.stderr)
        if args.keep:
            collect.keep(found, Path(args.keep))
            return print(f"kept      {len(runs)} runs in {args.keep}")
        flags.check_packages("report.py", "matplotlib")
        from takd.study import answer, sections  # matplotlib takes a second to import

        if args.table is not None:
            groups = [group for group in collect.group(runs) if not args.table or group.path[-1] in args.table]
            if not groups:
                raise UserError(f"no finished run of {' '.join(args.table)} in {' '.join(args.runs)}")
            return print(sections.compact_table(groups).markdown(), end="")
        place = Path(args.runs[0])
        document = Document(args.output or (place.parent / place.stem if place.suffix == ".jsonl" else place))
        studies, searches = collect.studies(found), ranking.searches(found)
        methods = pairs.tables(found, studies)
        asked = arms.questions(runs, methods)
        only = len(studies) + len(methods) + len(searches) == 1
        if not only:
            document.heading("Runs", 1)
            document.text(f"{len(runs)} runs in {', '.join(map(str, args.runs))}.")
            answers = answer.sections(document, asked)
        for each in studies:
            sections.study_section(document, each, only)
        for table in methods:
            sections.methods_section(document, table, only)
        for search in searches:
            sections.search_section(document, search, only)
        if only:
            answers = answer.sections(document, asked)
        sections.leaderboard(document, collect.group(runs))
        sections.cost_section(document, runs, args.price_per_hour)
        if found.unreadable:
            document.text(f"Left out, as it cannot be read: {'; '.join(found.unreadable)}.")
        document.write()
    except UserError as error:
        sys.exit(flags.fail("report.py", error, 2))
    except (ImportError, OSError) as error:
        sys.exit(flags.fail("report.py", error, 1))
    for line in filter(None, answers):
        print(f"answer    {line}")
    print(f"report    {document.folder / 'report.html'} and report.md: {len(runs)} runs")


if __name__ == "__main__":
    main()
