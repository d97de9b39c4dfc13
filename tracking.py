"""
Weights & Biases, for those who watch their runs there: train.py --wandb PROJECT. Every row of log.jsonl is
handed on, under names that are the row's own: train/loss, train/passes/0, eval/bpb/merged,
eval/learned/gates/3/memory, core/centered/arc_easy. log.jsonl stays the truth: what goes wrong here is said
once, and training goes on without it.

wandb is no dependency (`pip install wandb`) and is imported where it is used. WANDB_MODE=offline needs no
network; `wandb sync` sends such a run later.
"""

import html
import math
import os

from common import UserError, from_environment, say


def check_tracking(project):
    """
    Raise UserError unless rows can be sent to this project: before the work, as a run may take days. Without
    a project there is nothing to check. On a terminal, wandb asks for a key that it does not have.
    """
    if project is None:
        return
    try:
        import wandb
    except ImportError as e:
        raise UserError(f"--wandb needs wandb ({e}): run `pip install wandb`, or leave --wandb out") from e
    online = os.environ.get("WANDB_MODE", "online") in ("online", "run")
    if online and from_environment("RANK", 0) == 0:
        try:
            wandb.login(verify=False)  # that needs no network, without which a run can be trained, too
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as e:
            raise UserError(f"wandb does not know who you are ({first_line(e)}): "
                            "run `wandb login`, or set WANDB_MODE=offline") from e

def first_line(error):
    return str(error).strip().split("\n")[0]

def metrics(row):
    """
    The numbers in a row of log.jsonl, those in lists and dicts within it, too: {"kind/name/..": number},
    and its `step`. None, as the loss of a pass that has none, is left out, and so are texts.
    """
    found = {"step": row["step"]}

    def collect(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                collect(f"{name}/{i}", inner)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = value

    for key, value in row.items():
        if key not in ("kind", "step"):
            collect(f"{row['kind']}/{key}", value)
    return found

class Tracker:
    """
    A run on Weights & Biases. It has the run_id of ours, so a resumed run goes on with its own. The steps are
    a metric of ours: wandb's own may not go back, where a run can go back to a checkpoint.
    """

    def __init__(self, project, folder, run_id, config):
        """config: what was chosen, a dict that JSON takes. Raises nothing: a run goes on without wandb."""
        self.run = None
        try:
            import wandb
            self.run = wandb.init(
                project=project,
                id=run_id,
                name=folder.name,
                dir=str(folder),
                config=config,
                resume="allow",
                reinit="finish_previous",
                settings=wandb.Settings(console="off"),  # our streams stay ours
            )
            self.run.define_metric("*", step_metric="step")
        except Exception as e:  # of whatever kind: it is no reason to end a run
            self.give_up(e)

    def add(self, row):
        """Hand on a row of log.jsonl."""
        if self.run is None:
            return
        try:
            found = metrics(row)
            if row["kind"] == "sample":
                import wandb
                found["sample"] = wandb.Html(f"<pre>{html.escape(row['text'])}</pre>")
            self.run.log(found)
        except Exception as e:  # see above
            self.give_up(e)

    def give_up(self, error):
        self.run = None
        say(f"warning: wandb failed ({type(error).__name__}: {first_line(error)}): "
            "the run goes on without it, and log.jsonl has everything")
