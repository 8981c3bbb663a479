"""A run as a run of MLflow: on the server that MLFLOW_TRACKING_URI names, else in a store of its own in OUT/mlflow."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskdm.run.runfolder import flatten, write_json

# MLflow reads these as it is imported; what the user set stays. Without them it calls its vendor, speaks about its
# tables, and waits for minutes for a server that is gone.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("MLFLOW_LOGGING_LEVEL", "WARNING"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
):
    os.environ.setdefault(_name, _value)

from mlflow.entities import Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

STEP = "step"  # a metric that every line has
# Limits of MLflow's interface.
METRICS_AT_ONCE, PARAMS_AT_ONCE, LONGEST_PARAM = 1000, 100, 500


class MLflowRun:
    """The run that `OUT/mlflow/run.json` names, made where there is none."""

    settled_only = True  # MLflow forgets no point

    def __init__(self, out: Path) -> None:
        """Find the run, or make it, and ask how much of it is logged.

        Raises:
            MlflowException: the server does not answer, or refuses.
        """
        store = out.absolute() / "mlflow"
        store.mkdir(exist_ok=True)
        remote = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=remote or f"sqlite:///{store / 'mlflow.db'}")
        self._run = self._find(store / "run.json") or self._make(out.absolute().name, store, bool(remote))
        self._client.update_run(self._run, status="RUNNING")
        self.last = self._newest()

    def configuration(self, document: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run, dict(document), "config.json")
        known = self._client.get_run(self._run).data.params  # parameters cannot be changed any more
        new = [Param(name, _shown(value)) for name, value in flatten(document).items() if name not in known]
        for start in range(0, len(new), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=new[start : start + PARAMS_AT_ONCE])

    def scalars(self, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        now, batch = int(time.time() * 1000), list[Metric]()
        for x, numbers in lines:  # whole lines, so that the newest is known by its x
            if len(batch) + len(numbers) + 1 > METRICS_AT_ONCE:
                self._client.log_batch(self._run, metrics=batch)
                batch = []
            batch += [Metric(name, number, now, x) for name, number in ({STEP: x} | dict(numbers)).items()]
        self._client.log_batch(self._run, metrics=batch)

    def picture(self, path: Path, x: int) -> None:
        self._client.log_artifact(self._run, str(path), "samples")

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, status)

    def _find(self, note: Path) -> str | None:
        """The run of an earlier start, unless it was of another server or deleted there."""
        try:
            run = self._client.get_run(json.loads(note.read_text())["run"])
        except FileNotFoundError:
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None

    def _make(self, name: str, store: Path, remote: bool) -> str:
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "maskdm")
        found = self._client.get_experiment_by_name(experiment_name)
        where = None if remote else (store / "artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(experiment_name, where)
        run = str(self._client.create_run(experiment, run_name=name).info.run_id)
        write_json(store / "run.json", {"run": run})
        return run

    def _newest(self) -> float:
        return max((point.step for point in self._client.get_metric_history(self._run, STEP)), default=-math.inf)


def _shown(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:LONGEST_PARAM]
