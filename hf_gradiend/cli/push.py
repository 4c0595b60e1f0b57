"""Push a GRADIEND, an adapter or an edited model to the Hub, with a card from its report."""

import argparse

from hf_gradiend.cards import KINDS
from hf_gradiend.hub import PushOptions, push_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--folder", required=True, help="what train, adapt or export wrote")
    parser.add_argument("--repo_id", required=True, help="org/name on the Hub")
    parser.add_argument("--report", help="report.json; default: the folder's own")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="branch; made where it does not exist")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--commit_message")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Push the folder."""
    options = PushOptions(
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    commit = push_folder(args.folder, args.kind, options, report=args.report)
    if not args.json:
        print(f"Pushed to {commit.pr_url or commit.commit_url}")
    return {
        "repo_id": args.repo_id,
        "commit": commit.oid,
        "url": commit.commit_url,
        "pull_request": commit.pr_url,
    }
