"""The table of facts that models recall from the pages that they read, on the page of claims."""

from language import sweeps
from language.facts import CONTEXTS

from .claim import Results, percent
from .language import name, rows
from .synthetic_tables import Table

_SWEEP = "papers_layer"
_COMMAND = f"python experiments/run_language.py --sweep={_SWEEP} --out=experiments/results/{sweeps.FILES[_SWEEP]}"
_KINDS = dict(zip(CONTEXTS, ("with the page", "line removed", "other page"), strict=True))


def table(results: Results) -> Table:
  """Returns a row per model of the sweep, from the best to the worst, with a note that says if none has run."""
  title = f"Recall of facts from held-out pages, sweep `{_SWEEP}`"
  found = {model: row["facts"] for model, row in rows(results, _SWEEP).items() if row["facts"]}
  if not found:
    return Table(title, [], [], [f"Not run yet: `{_COMMAND}`."])
  first = next(iter(found.values()))
  head = ["", *(f"{part['start']} to {part['stop']}" for part in first["distances"]), *_KINDS.values(),
          *(f"nats, {kind}" for kind in _KINDS.values())]
  cells = [[name(model), *(percent(part["page"]["right"]) for part in facts["distances"]),
            *(percent(facts[kind]["right"]) for kind in _KINDS), *(f"{facts[kind]['loss']:.3f}" for kind in _KINDS)]
           for model, facts in sorted(found.items(), key=lambda item: -item[1]["page"]["right"])]
  return Table(title, head, cells, [
      f"Values that greedy decoding gives whole, in percent of {first['questions']:,} questions on {first['facts']} "
      "facts: with the page that has the value, by tokens from there to its repetition and over all distances, and "
      "with two controls, the page without the line and another country's page. Then the loss per token of a value."])
