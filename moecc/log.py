"""Log what happens to stderr, by the topics named in MOECC_LOG (`passes,kernels`, or `all`)."""

import logging
import os

TOPICS = ("passes", "kernels")


def install() -> None:
    """Show the topics that MOECC_LOG names; without it nothing is shown."""
    wanted = {topic.strip() for topic in os.environ.get("MOECC_LOG", "").split(",")} - {""}
    if not wanted:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for topic in TOPICS:
        if topic in wanted or "all" in wanted:
            logger = logging.getLogger(f"moecc.{topic}")
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
    unknown = wanted.difference(TOPICS, {"all"})
    if unknown:
        logging.getLogger("moecc").warning(
            "MOECC_LOG names unknown topics %s; there are %s and all", sorted(unknown), list(TOPICS)
        )
