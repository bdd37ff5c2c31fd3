"""The task `next_line`: which of four lines follows ten lines of the standard library. python make_task.py FOLDER"""

import json
import random
import sys
import sysconfig
from pathlib import Path

TASK = """task: next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/docs.jsonl
  cache_dir: {folder}/cache
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""

folder, numbers = Path(sys.argv[1]), random.Random(0)
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
numbers.shuffle(files)
with open(folder / "docs.jsonl", "w") as out:
    for file in files[:60]:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        if len(lines) >= 40:
            at = numbers.randrange(12, len(lines) - 8)
            wrong = [numbers.choice(lines) for _ in range(3)]
            doc = {
                "context": "\n".join(lines[at - 10 : at]) + "\n",
                "choices": [lines[at], *wrong],
                "right": 0,
            }
            out.write(json.dumps(doc) + "\n")
(folder / "next_line.yaml").write_text(TASK.format(folder=folder))
