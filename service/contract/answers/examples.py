"""Examples of the OpenAPI document and the /docs page. A test checks each against its schema."""

import json
from typing import Any

_ID = "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50"

SUBMISSIONS: dict[str, Any] = {
    "smallest": {
        "summary": "Only a model and a dataset; everything else has a default",
        "value": {"model": {"name": "mlp"}, "dataset": {"name": "digits"}},
    },
    "mixed precision": {
        "summary": "Two epochs in FP16 with loss scaling",
        "value": {
            "name": "digits-fp16",
            "model": {"name": "mlp", "params": {"hidden": [128]}},
            "dataset": {"name": "digits"},
            "optimizer": {"name": "adamw", "params": {"lr": 0.001}},
            "precision": {"mode": "automatic", "precision_level": "fp16", "initial_scale": 65536.0},
            "training": {"epochs": 2, "batch_size": 64},
            "tags": {"team": "vision"},
        },
    },
}

_SPEC: dict[str, Any] = SUBMISSIONS["mixed precision"]["value"]

STATS: dict[str, Any] = {
    "job_id": _ID,
    "state": "running",
    "is_terminal": False,
    "attempt": 1,
    "current_step": 23,
    "total_steps": 46,
    "epoch": 1,
    "progress": 0.5,
    "eta_seconds": 0.4,
    "loss": 0.41,
    "average_loss": 0.87,
    "current_scale": 32768.0,
    "average_scale": 35617.4,
    "overflow_count": 1,
    "underflow_count": 0,
    "nan_count": 0,
    "skipped_steps": 1,
    "overflow_rate": None,
    "overflow_budget_exceeded": False,
    "underflow_estimate": 1.2e-09,
    "grad_norm": 1.7,
    "learning_rate": 0.001,
    "memory_usage": 0.021,
    "memory_allocated_bytes": 351272960,
    "memory_reserved_bytes": 351272960,
    "memory_peak_bytes": 352321536,
    "precision": {"mode": "automatic", "precision_level": "fp16", "compute_dtype": "float16"},
    "evaluation": {
        "step": 23,
        "split": "test",
        "loss": 0.38,
        "metrics": {"accuracy": 0.91},
        "seconds": 0.02,
    },
    "last_overflow": {"step": 1, "layer": None, "kind": "unknown"},
    "performance_metrics": {
        "steps_per_second": 57.0,
        "samples_per_second": 3648.0,
        "step_time_ms": {"p50": 16.9, "p95": 19.4, "max": 24.0},
        "host_syncs_per_step": 0.0,
    },
    "last_step_at": "2026-11-02T09:30:01.250000Z",
    "updated_at": "2026-11-02T09:30:01.250000Z",
}

JOB: dict[str, Any] = {
    "id": _ID,
    "name": "digits-fp16",
    "state": "running",
    "is_terminal": False,
    "status_reason": None,
    "spec": _SPEC,
    "attempt": 1,
    "max_attempts": 3,
    "priority": 0,
    "tags": {"team": "vision"},
    "parent_id": None,
    "from_checkpoint": None,
    "worker": "gpu-host-1",
    "created_at": "2026-11-02T09:30:00.000000Z",
    "started_at": "2026-11-02T09:30:00.850000Z",
    "finished_at": None,
    "transitions": [
        {"state": "queued", "at": "2026-11-02T09:30:00.000000Z", "reason": "submitted"},
        {"state": "starting", "at": "2026-11-02T09:30:00.020000Z", "reason": None},
        {"state": "running", "at": "2026-11-02T09:30:00.850000Z", "reason": None},
    ],
    "stats": STATS,
}

RESOLVED: dict[str, Any] = {
    "valid": True,
    "warnings": ["precision_level: FP16 on a CPU is slow, convolutions above all; 'bf16' is faster there"],
    "resolved": {**_SPEC, "loss": {"name": "cross_entropy", "params": {}}},
    "capable_workers": 2,
}

METRICS: dict[str, Any] = {
    "job_id": _ID,
    "state": "running",
    "is_terminal": False,
    "attempt": 1,
    "count": 3,
    "columns": {"step": [1, 2, 3], "loss": ["Infinity", 2.31, 2.27], "scale": [65536.0, 32768.0, 32768.0]},
    "next_after_step": 3,
    "last_step": 23,
    "downsampled": False,
    "bucket_steps": None,
}
METRICS_CSV = "step,loss,scale\r\n1,Infinity,65536.0\r\n2,2.31,32768.0\r\n"
METRICS_NDJSON = '{"step":1,"loss":"Infinity","scale":65536.0}\n{"step":2,"loss":2.31,"scale":32768.0}\n'

EVENTS: dict[str, Any] = {
    "items": [
        {
            "seq": 1,
            "at": "2026-11-02T09:30:00.000000Z",
            "type": "state",
            "level": "info",
            "message": "queued: submitted",
            "data": {"state": "queued", "attempt": 1, "worker": None},
        }
    ],
    "next_after": 1,
}

TENANT_EVENTS: dict[str, Any] = {
    "items": [
        {
            "job_id": _ID,
            "seq": 1,
            "at": "2026-11-02T09:30:00.000000Z",
            "type": "state",
            "level": "info",
            "message": "queued: submitted",
            "data": {"state": "queued", "attempt": 1, "worker": None},
            "actor": {
                "kind": "key",
                "id": "01935b2e-0d02-7c11-8a53-6b1f0c9e7d42",
                "name": "ci",
                "tenant": "vision",
            },
        }
    ],
    "next_after": "WzEsIjkyZjAzMjM2ZTQyZCJd",
}
TENANT_EVENT_STREAM = (
    "event: event\nid: WzEsIjkyZjAzMjM2ZTQyZCJd\ndata: "
    + json.dumps(TENANT_EVENTS["items"][0], separators=(",", ":"))
    + "\n\n"
)

CHECKPOINT: dict[str, Any] = {
    "step": 23,
    "bytes": 1204224,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": "2026-11-02T09:30:01.300000Z",
    "metrics": {"epoch": 1.0, "loss": 0.41, "average_loss": 0.87},
}

RETRIES: dict[str, Any] = {
    "from the start": {"summary": "The whole job again", "value": {}},
    "from a checkpoint": {
        "summary": "Go on from a checkpoint that the job has left",
        "value": {"from_checkpoint": 23},
    },
}

STREAM_STATE: dict[str, Any] = {
    "seq": 3,
    "at": "2026-11-02T09:30:00.850000Z",
    "state": "running",
    "is_terminal": False,
    "attempt": 1,
    "worker": "gpu-host-1",
    "message": "running",
}
STREAM_METRICS: dict[str, Any] = {
    "attempt": 1,
    "count": 2,
    "columns": {"step": [45, 46], "loss": [0.29, 0.31]},
    "next_after_step": 46,
    "last_step": 46,
}
STREAM_END: dict[str, Any] = {
    "job_id": _ID,
    "state": "succeeded",
    "is_terminal": True,
    "status_reason": None,
    "attempt": 1,
    "last_step": 46,
    "deleted": False,
}
STREAM = "".join(
    f"event: {kind}\nid: {identifier}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
    for kind, identifier, data in (
        ("state", "s0.e3.j3e4f50", STREAM_STATE),
        ("metrics", "s46.e3.j3e4f50", STREAM_METRICS),
        ("end", "s46.e4.j3e4f50.end", STREAM_END),
    )
)

COMPONENT: dict[str, Any] = {
    "kind": "model",
    "name": "mlp",
    "help": "Fully connected layers with ReLU between them.",
    "schema": {
        "type": "object",
        "properties": {
            "hidden": {"type": "array", "items": {"type": "integer", "minimum": 1}, "default": [512]}
        },
        "additionalProperties": False,
    },
    "extra": {},
}

WORKER: dict[str, Any] = {
    "id": "gpu-host-1-4711",
    "name": "gpu-host-1",
    "pid": 4711,
    "capability": {
        "device_type": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
        "device_count": 1,
        "bf16": True,
        "fp16": True,
        "memory_bytes": 85899345920,
        "speed": {
            "float32": {
                "matmul": 1.0,
                "convolution": 1.0,
                "matmul_gflops": 51200.0,
                "convolution_gflops": 88700.0,
            },
            "bfloat16": {
                "matmul": 13.7,
                "convolution": 2.61,
                "matmul_gflops": 701000.0,
                "convolution_gflops": 231000.0,
            },
        },
    },
    "versions": {"torch": "2.13.0"},
    "slots": 1,
    "busy": 1,
    "state": "busy",
    "started_at": "2026-11-02T09:00:00.000000Z",
    "last_seen": "2026-11-02T09:30:01.000000Z",
}

PROBLEM: dict[str, Any] = {
    "type": "about:blank",
    "title": "Unprocessable Content",
    "status": 422,
    "detail": "The job's specification is not valid.",
    "instance": "/jobs",
    "code": "invalid_request",
    "errors": [{"pointer": "/model/name", "detail": "is no registered model; did you mean 'mlp'?"}],
}
