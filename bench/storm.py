"""Does a server answer 500 requests at once and 10,000 malformed ones, and live?

counterflow serve --run runs/tiny & python bench/storm.py --model tiny
"""

import argparse
import json
import sys

from counterflow.benchmark.storm import storm


def main() -> int:
    """Good ones, malformed ones, good ones again; 1 if any answer was lost or odd."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", required=True)
    parser.add_argument("--good", type=int, default=500)
    parser.add_argument("--malformed", type=int, default=10_000)
    wish = parser.parse_args()
    found = [
        storm(wish.host, wish.port, wish.model, wish.good, wish.good, spoilt=False),
        storm(wish.host, wish.port, wish.model, wish.malformed, 50, spoilt=True),
        storm(wish.host, wish.port, wish.model, 20, 20, spoilt=False),
    ]
    for one in found:
        print(json.dumps(one))
    return int(any(one["odd"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
