import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Anchor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANCHOR_UNSPECIFIED: _ClassVar[Anchor]
    ANCHOR_HORIZON: _ClassVar[Anchor]
    ANCHOR_SEGMENT: _ClassVar[Anchor]
    ANCHOR_CONTINUE: _ClassVar[Anchor]

class Sizing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIZING_UNSPECIFIED: _ClassVar[Sizing]
    SIZING_FIXED: _ClassVar[Sizing]
    SIZING_GROW: _ClassVar[Sizing]
    SIZING_ELASTIC: _ClassVar[Sizing]

class Compute(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPUTE_UNSPECIFIED: _ClassVar[Compute]
    COMPUTE_BF16: _ClassVar[Compute]
    COMPUTE_FP32: _ClassVar[Compute]

class Embeddings(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMBEDDINGS_UNSPECIFIED: _ClassVar[Embeddings]
    EMBEDDINGS_COMPUTE: _ClassVar[Embeddings]
    EMBEDDINGS_FP32: _ClassVar[Embeddings]

class Compile(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPILE_UNSPECIFIED: _ClassVar[Compile]
    COMPILE_AUTO: _ClassVar[Compile]
    COMPILE_ON: _ClassVar[Compile]
    COMPILE_OFF: _ClassVar[Compile]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_STARTING: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_PAUSED: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_STATE_CHANGED: _ClassVar[EventKind]
    EVENT_KIND_ATTEMPT_STARTED: _ClassVar[EventKind]
    EVENT_KIND_ATTEMPT_ENDED: _ClassVar[EventKind]
    EVENT_KIND_VALUES_IN_FORCE: _ClassVar[EventKind]
    EVENT_KIND_CHECKPOINT_COMMITTED: _ClassVar[EventKind]
    EVENT_KIND_CHECKPOINT_FALLBACK: _ClassVar[EventKind]
    EVENT_KIND_EVALUATED: _ClassVar[EventKind]
    EVENT_KIND_SAMPLED: _ClassVar[EventKind]
    EVENT_KIND_WARNING: _ClassVar[EventKind]
    EVENT_KIND_REQUESTED: _ClassVar[EventKind]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_READ: _ClassVar[Role]
    ROLE_SUBMIT: _ClassVar[Role]
    ROLE_ADMIN: _ClassVar[Role]

class Directive(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTIVE_UNSPECIFIED: _ClassVar[Directive]
    DIRECTIVE_CHECKPOINT: _ClassVar[Directive]
    DIRECTIVE_STOP: _ClassVar[Directive]
ANCHOR_UNSPECIFIED: Anchor
ANCHOR_HORIZON: Anchor
ANCHOR_SEGMENT: Anchor
ANCHOR_CONTINUE: Anchor
SIZING_UNSPECIFIED: Sizing
SIZING_FIXED: Sizing
SIZING_GROW: Sizing
SIZING_ELASTIC: Sizing
COMPUTE_UNSPECIFIED: Compute
COMPUTE_BF16: Compute
COMPUTE_FP32: Compute
EMBEDDINGS_UNSPECIFIED: Embeddings
EMBEDDINGS_COMPUTE: Embeddings
EMBEDDINGS_FP32: Embeddings
COMPILE_UNSPECIFIED: Compile
COMPILE_AUTO: Compile
COMPILE_ON: Compile
COMPILE_OFF: Compile
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_STARTING: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_PAUSED: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_STATE_CHANGED: EventKind
EVENT_KIND_ATTEMPT_STARTED: EventKind
EVENT_KIND_ATTEMPT_ENDED: EventKind
EVENT_KIND_VALUES_IN_FORCE: EventKind
EVENT_KIND_CHECKPOINT_COMMITTED: EventKind
EVENT_KIND_CHECKPOINT_FALLBACK: EventKind
EVENT_KIND_EVALUATED: EventKind
EVENT_KIND_SAMPLED: EventKind
EVENT_KIND_WARNING: EventKind
EVENT_KIND_REQUESTED: EventKind
ROLE_UNSPECIFIED: Role
ROLE_READ: Role
ROLE_SUBMIT: Role
ROLE_ADMIN: Role
DIRECTIVE_UNSPECIFIED: Directive
DIRECTIVE_CHECKPOINT: Directive
DIRECTIVE_STOP: Directive

class JobSpec(_message.Message):
    __slots__ = ("name", "model", "data", "batch", "optimizer", "schedule", "start", "guards", "evaluate", "sample", "checkpoint", "resources", "precision", "compile", "deterministic", "priority", "preemptible")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    GUARDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    COMPILE_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIBLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: ModelSpec
    data: DataSpec
    batch: BatchSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    start: StartSpec
    guards: GuardsSpec
    evaluate: EvaluateSpec
    sample: SampleSpec
    checkpoint: CheckpointSpec
    resources: ResourcesSpec
    precision: PrecisionSpec
    compile: Compile
    deterministic: bool
    priority: int
    preemptible: bool
    def __init__(self, name: _Optional[str] = ..., model: _Optional[_Union[ModelSpec, _Mapping]] = ..., data: _Optional[_Union[DataSpec, _Mapping]] = ..., batch: _Optional[_Union[BatchSpec, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerSpec, _Mapping]] = ..., schedule: _Optional[_Union[ScheduleSpec, _Mapping]] = ..., start: _Optional[_Union[StartSpec, _Mapping]] = ..., guards: _Optional[_Union[GuardsSpec, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateSpec, _Mapping]] = ..., sample: _Optional[_Union[SampleSpec, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointSpec, _Mapping]] = ..., resources: _Optional[_Union[ResourcesSpec, _Mapping]] = ..., precision: _Optional[_Union[PrecisionSpec, _Mapping]] = ..., compile: _Optional[_Union[Compile, str]] = ..., deterministic: _Optional[bool] = ..., priority: _Optional[int] = ..., preemptible: _Optional[bool] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "n_kv_head", "vocab_size")
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    ASPECT_RATIO_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LEN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_PATTERN_FIELD_NUMBER: _ClassVar[int]
    N_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    depth: int
    aspect_ratio: int
    head_dim: int
    max_seq_len: int
    window_pattern: str
    n_kv_head: int
    vocab_size: int
    def __init__(self, depth: _Optional[int] = ..., aspect_ratio: _Optional[int] = ..., head_dim: _Optional[int] = ..., max_seq_len: _Optional[int] = ..., window_pattern: _Optional[str] = ..., n_kv_head: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class DataSpec(_message.Message):
    __slots__ = ("source", "tokenizer", "validation", "order_seed")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FIELD_NUMBER: _ClassVar[int]
    ORDER_SEED_FIELD_NUMBER: _ClassVar[int]
    source: str
    tokenizer: str
    validation: str
    order_seed: int
    def __init__(self, source: _Optional[str] = ..., tokenizer: _Optional[str] = ..., validation: _Optional[str] = ..., order_seed: _Optional[int] = ...) -> None: ...

class BatchSpec(_message.Message):
    __slots__ = ("device_batch_size", "total_batch_size")
    DEVICE_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    device_batch_size: int
    total_batch_size: int
    def __init__(self, device_batch_size: _Optional[int] = ..., total_batch_size: _Optional[int] = ...) -> None: ...

class OptimizerSpec(_message.Message):
    __slots__ = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "smear_lr", "weight_decay", "grad_clip_norm")
    EMBEDDING_LR_FIELD_NUMBER: _ClassVar[int]
    UNEMBEDDING_LR_FIELD_NUMBER: _ClassVar[int]
    MATRIX_LR_FIELD_NUMBER: _ClassVar[int]
    SCALAR_LR_FIELD_NUMBER: _ClassVar[int]
    SMEAR_LR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    scalar_lr: float
    smear_lr: float
    weight_decay: float
    grad_clip_norm: float
    def __init__(self, embedding_lr: _Optional[float] = ..., unembedding_lr: _Optional[float] = ..., matrix_lr: _Optional[float] = ..., scalar_lr: _Optional[float] = ..., smear_lr: _Optional[float] = ..., weight_decay: _Optional[float] = ..., grad_clip_norm: _Optional[float] = ...) -> None: ...

class ScheduleSpec(_message.Message):
    __slots__ = ("num_iterations", "warmup_steps", "warmdown_ratio", "final_lr_frac", "anchor")
    NUM_ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    WARMDOWN_RATIO_FIELD_NUMBER: _ClassVar[int]
    FINAL_LR_FRAC_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    num_iterations: int
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float
    anchor: Anchor
    def __init__(self, num_iterations: _Optional[int] = ..., warmup_steps: _Optional[int] = ..., warmdown_ratio: _Optional[float] = ..., final_lr_frac: _Optional[float] = ..., anchor: _Optional[_Union[Anchor, str]] = ...) -> None: ...

class StartSpec(_message.Message):
    __slots__ = ("init_seed",)
    FROM_FIELD_NUMBER: _ClassVar[int]
    INIT_SEED_FIELD_NUMBER: _ClassVar[int]
    init_seed: int
    def __init__(self, init_seed: _Optional[int] = ..., **kwargs) -> None: ...

class GuardsSpec(_message.Message):
    __slots__ = ("max_lr_jump", "allow_lr_jump")
    MAX_LR_JUMP_FIELD_NUMBER: _ClassVar[int]
    ALLOW_LR_JUMP_FIELD_NUMBER: _ClassVar[int]
    max_lr_jump: float
    allow_lr_jump: bool
    def __init__(self, max_lr_jump: _Optional[float] = ..., allow_lr_jump: _Optional[bool] = ...) -> None: ...

class EvaluateSpec(_message.Message):
    __slots__ = ("every", "tokens")
    EVERY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    every: int
    tokens: int
    def __init__(self, every: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class SampleSpec(_message.Message):
    __slots__ = ("every",)
    EVERY_FIELD_NUMBER: _ClassVar[int]
    every: int
    def __init__(self, every: _Optional[int] = ...) -> None: ...

class CheckpointSpec(_message.Message):
    __slots__ = ("every_steps", "every_s", "keep_last", "keep_every_steps", "keep_best")
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVERY_S_FIELD_NUMBER: _ClassVar[int]
    KEEP_LAST_FIELD_NUMBER: _ClassVar[int]
    KEEP_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    KEEP_BEST_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    every_s: int
    keep_last: int
    keep_every_steps: int
    keep_best: bool
    def __init__(self, every_steps: _Optional[int] = ..., every_s: _Optional[int] = ..., keep_last: _Optional[int] = ..., keep_every_steps: _Optional[int] = ..., keep_best: _Optional[bool] = ...) -> None: ...

class ResourcesSpec(_message.Message):
    __slots__ = ("workers", "gpus_per_worker", "cpus_per_worker", "wait_for_nodes", "gpu_type")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GPUS_PER_WORKER_FIELD_NUMBER: _ClassVar[int]
    CPUS_PER_WORKER_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_NODES_FIELD_NUMBER: _ClassVar[int]
    GPU_TYPE_FIELD_NUMBER: _ClassVar[int]
    workers: WorkersSpec
    gpus_per_worker: int
    cpus_per_worker: int
    wait_for_nodes: bool
    gpu_type: str
    def __init__(self, workers: _Optional[_Union[WorkersSpec, _Mapping]] = ..., gpus_per_worker: _Optional[int] = ..., cpus_per_worker: _Optional[int] = ..., wait_for_nodes: _Optional[bool] = ..., gpu_type: _Optional[str] = ...) -> None: ...

class WorkersSpec(_message.Message):
    __slots__ = ("min", "max", "policy", "cooldown_s")
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    COOLDOWN_S_FIELD_NUMBER: _ClassVar[int]
    min: int
    max: int
    policy: Sizing
    cooldown_s: int
    def __init__(self, min: _Optional[int] = ..., max: _Optional[int] = ..., policy: _Optional[_Union[Sizing, str]] = ..., cooldown_s: _Optional[int] = ...) -> None: ...

class PrecisionSpec(_message.Message):
    __slots__ = ("compute", "embeddings")
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    compute: Compute
    embeddings: Embeddings
    def __init__(self, compute: _Optional[_Union[Compute, str]] = ..., embeddings: _Optional[_Union[Embeddings, str]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "spec", "state", "reason", "start", "step", "create_time", "start_time", "end_time", "attempts", "latest", "in_force", "checkpoint", "desired_state", "validation_bpb", "eta_s", "workers", "goodput", "energy_joules")
    ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DESIRED_STATE_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_BPB_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    ENERGY_JOULES_FIELD_NUMBER: _ClassVar[int]
    id: str
    spec: JobSpec
    state: JobState
    reason: str
    start: CheckpointRef
    step: int
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    attempts: _containers.RepeatedCompositeFieldContainer[Attempt]
    latest: MetricPoint
    in_force: _containers.RepeatedCompositeFieldContainer[GroupValues]
    checkpoint: CheckpointRef
    desired_state: JobState
    validation_bpb: float
    eta_s: float
    workers: int
    goodput: Goodput
    energy_joules: float
    def __init__(self, id: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., state: _Optional[_Union[JobState, str]] = ..., reason: _Optional[str] = ..., start: _Optional[_Union[CheckpointRef, _Mapping]] = ..., step: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attempts: _Optional[_Iterable[_Union[Attempt, _Mapping]]] = ..., latest: _Optional[_Union[MetricPoint, _Mapping]] = ..., in_force: _Optional[_Iterable[_Union[GroupValues, _Mapping]]] = ..., checkpoint: _Optional[_Union[CheckpointRef, _Mapping]] = ..., desired_state: _Optional[_Union[JobState, str]] = ..., validation_bpb: _Optional[float] = ..., eta_s: _Optional[float] = ..., workers: _Optional[int] = ..., goodput: _Optional[_Union[Goodput, _Mapping]] = ..., energy_joules: _Optional[float] = ...) -> None: ...

class Goodput(_message.Message):
    __slots__ = ("queue_s", "start_s", "data_s", "productive_s", "recompute_s", "checkpoint_s", "evaluation_s", "wait_s", "ratio")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    DATA_S_FIELD_NUMBER: _ClassVar[int]
    PRODUCTIVE_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_S_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    start_s: float
    data_s: float
    productive_s: float
    recompute_s: float
    checkpoint_s: float
    evaluation_s: float
    wait_s: float
    ratio: float
    def __init__(self, queue_s: _Optional[float] = ..., start_s: _Optional[float] = ..., data_s: _Optional[float] = ..., productive_s: _Optional[float] = ..., recompute_s: _Optional[float] = ..., checkpoint_s: _Optional[float] = ..., evaluation_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., ratio: _Optional[float] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("number", "start_time", "end_time", "start_step", "outcome", "message")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    start_step: int
    outcome: str
    message: str
    def __init__(self, number: _Optional[int] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_step: _Optional[int] = ..., outcome: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class CheckpointRef(_message.Message):
    __slots__ = ("job_id", "step", "attempt")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    step: int
    attempt: int
    def __init__(self, job_id: _Optional[str] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class GroupValues(_message.Message):
    __slots__ = ("group", "learning_rate", "momentum", "weight_decay")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    group: str
    learning_rate: float
    momentum: float
    weight_decay: float
    def __init__(self, group: _Optional[str] = ..., learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class MetricPoint(_message.Message):
    __slots__ = ("step", "loss", "loss_smoothed", "gradient_norm", "step_s", "data_wait_s", "tokens", "tokens_per_s", "mfu_ratio", "groups", "time", "devices", "checkpoint_s", "rank_busy_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SMOOTHED_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    DATA_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MFU_RATIO_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_S_FIELD_NUMBER: _ClassVar[int]
    RANK_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    loss_smoothed: float
    gradient_norm: float
    step_s: float
    data_wait_s: float
    tokens: int
    tokens_per_s: float
    mfu_ratio: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupValues]
    time: _timestamp_pb2.Timestamp
    devices: _containers.RepeatedCompositeFieldContainer[DeviceSample]
    checkpoint_s: float
    rank_busy_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., loss_smoothed: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., step_s: _Optional[float] = ..., data_wait_s: _Optional[float] = ..., tokens: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., mfu_ratio: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupValues, _Mapping]]] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., devices: _Optional[_Iterable[_Union[DeviceSample, _Mapping]]] = ..., checkpoint_s: _Optional[float] = ..., rank_busy_s: _Optional[_Iterable[float]] = ...) -> None: ...

class DeviceSample(_message.Message):
    __slots__ = ("index", "name", "memory_used_bytes", "memory_total_bytes", "utilization_ratio", "power_watts", "temperature_celsius", "energy_joules", "throttled")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_RATIO_FIELD_NUMBER: _ClassVar[int]
    POWER_WATTS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    ENERGY_JOULES_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization_ratio: float
    power_watts: float
    temperature_celsius: float
    energy_joules: float
    throttled: bool
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., memory_used_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., utilization_ratio: _Optional[float] = ..., power_watts: _Optional[float] = ..., temperature_celsius: _Optional[float] = ..., energy_joules: _Optional[float] = ..., throttled: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("kind", "message", "checkpoint", "checkpoint_bytes", "checkpoint_s", "checkpoint_stall_s", "validation_bpb", "groups", "state", "outcome", "step", "evaluation_set", "checkpoint_postponed_s", "device", "actor", "evaluation_s")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_S_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_STALL_S_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_BPB_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_SET_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_POSTPONED_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_S_FIELD_NUMBER: _ClassVar[int]
    kind: EventKind
    message: str
    checkpoint: CheckpointRef
    checkpoint_bytes: int
    checkpoint_s: float
    checkpoint_stall_s: float
    validation_bpb: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupValues]
    state: JobState
    outcome: str
    step: int
    evaluation_set: str
    checkpoint_postponed_s: float
    device: DeviceInfo
    actor: str
    evaluation_s: float
    def __init__(self, kind: _Optional[_Union[EventKind, str]] = ..., message: _Optional[str] = ..., checkpoint: _Optional[_Union[CheckpointRef, _Mapping]] = ..., checkpoint_bytes: _Optional[int] = ..., checkpoint_s: _Optional[float] = ..., checkpoint_stall_s: _Optional[float] = ..., validation_bpb: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupValues, _Mapping]]] = ..., state: _Optional[_Union[JobState, str]] = ..., outcome: _Optional[str] = ..., step: _Optional[int] = ..., evaluation_set: _Optional[str] = ..., checkpoint_postponed_s: _Optional[float] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., actor: _Optional[str] = ..., evaluation_s: _Optional[float] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("name", "memory_bytes", "free_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    memory_bytes: int
    free_bytes: int
    def __init__(self, name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("spec", "shape", "parameters", "parameters_total", "flops_per_token", "grad_accum_steps", "start_step", "steps", "tokens", "rates", "start", "refusals", "warnings", "checkpoint_bytes", "steps_at_risk", "memory", "time", "checkpoints_kept", "checkpoints_bytes", "seconds_at_risk", "start_name", "lineage", "ways_out", "workers")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GRAD_ACCUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_AT_RISK_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_KEPT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_AT_RISK_FIELD_NUMBER: _ClassVar[int]
    START_NAME_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    WAYS_OUT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    shape: Shape
    parameters: _containers.RepeatedCompositeFieldContainer[ParameterCount]
    parameters_total: int
    flops_per_token: int
    grad_accum_steps: int
    start_step: int
    steps: int
    tokens: int
    rates: _containers.RepeatedCompositeFieldContainer[RateRow]
    start: CheckpointRef
    refusals: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    checkpoint_bytes: int
    steps_at_risk: int
    memory: MemoryEstimate
    time: TimeEstimate
    checkpoints_kept: int
    checkpoints_bytes: int
    seconds_at_risk: float
    start_name: str
    lineage: _containers.RepeatedCompositeFieldContainer[Ancestor]
    ways_out: _containers.RepeatedScalarFieldContainer[str]
    workers: _containers.RepeatedCompositeFieldContainer[WorkersOption]
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., shape: _Optional[_Union[Shape, _Mapping]] = ..., parameters: _Optional[_Iterable[_Union[ParameterCount, _Mapping]]] = ..., parameters_total: _Optional[int] = ..., flops_per_token: _Optional[int] = ..., grad_accum_steps: _Optional[int] = ..., start_step: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., rates: _Optional[_Iterable[_Union[RateRow, _Mapping]]] = ..., start: _Optional[_Union[CheckpointRef, _Mapping]] = ..., refusals: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., checkpoint_bytes: _Optional[int] = ..., steps_at_risk: _Optional[int] = ..., memory: _Optional[_Union[MemoryEstimate, _Mapping]] = ..., time: _Optional[_Union[TimeEstimate, _Mapping]] = ..., checkpoints_kept: _Optional[int] = ..., checkpoints_bytes: _Optional[int] = ..., seconds_at_risk: _Optional[float] = ..., start_name: _Optional[str] = ..., lineage: _Optional[_Iterable[_Union[Ancestor, _Mapping]]] = ..., ways_out: _Optional[_Iterable[str]] = ..., workers: _Optional[_Iterable[_Union[WorkersOption, _Mapping]]] = ...) -> None: ...

class WorkersOption(_message.Message):
    __slots__ = ("workers", "grad_accum_steps")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GRAD_ACCUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    workers: int
    grad_accum_steps: int
    def __init__(self, workers: _Optional[int] = ..., grad_accum_steps: _Optional[int] = ...) -> None: ...

class MemoryEstimate(_message.Message):
    __slots__ = ("parts", "peak_bytes", "device_bytes", "largest_device_batch_size", "snapshot_bytes")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LARGEST_DEVICE_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[MemoryPart]
    peak_bytes: int
    device_bytes: int
    largest_device_batch_size: int
    snapshot_bytes: int
    def __init__(self, parts: _Optional[_Iterable[_Union[MemoryPart, _Mapping]]] = ..., peak_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., largest_device_batch_size: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ...) -> None: ...

class MemoryPart(_message.Message):
    __slots__ = ("part", "bytes")
    PART_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    part: str
    bytes: int
    def __init__(self, part: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class TimeEstimate(_message.Message):
    __slots__ = ("step_s", "total_s", "tokens_per_s", "mfu_ratio", "basis")
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MFU_RATIO_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    total_s: float
    tokens_per_s: float
    mfu_ratio: float
    basis: str
    def __init__(self, step_s: _Optional[float] = ..., total_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., mfu_ratio: _Optional[float] = ..., basis: _Optional[str] = ...) -> None: ...

class Shape(_message.Message):
    __slots__ = ("n_layer", "n_embd", "n_head", "n_kv_head", "vocab_size", "padded_vocab_size", "sequence_len")
    N_LAYER_FIELD_NUMBER: _ClassVar[int]
    N_EMBD_FIELD_NUMBER: _ClassVar[int]
    N_HEAD_FIELD_NUMBER: _ClassVar[int]
    N_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PADDED_VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LEN_FIELD_NUMBER: _ClassVar[int]
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    padded_vocab_size: int
    sequence_len: int
    def __init__(self, n_layer: _Optional[int] = ..., n_embd: _Optional[int] = ..., n_head: _Optional[int] = ..., n_kv_head: _Optional[int] = ..., vocab_size: _Optional[int] = ..., padded_vocab_size: _Optional[int] = ..., sequence_len: _Optional[int] = ...) -> None: ...

class ParameterCount(_message.Message):
    __slots__ = ("kind", "count")
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    count: int
    def __init__(self, kind: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RateRow(_message.Message):
    __slots__ = ("group", "parent", "points", "learning_rate_ratio", "momentum_ratio", "weight_decay_ratio", "claimed_learning_rate")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_RATIO_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_RATIO_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_RATIO_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    group: str
    parent: GroupValues
    points: _containers.RepeatedCompositeFieldContainer[RatePoint]
    learning_rate_ratio: float
    momentum_ratio: float
    weight_decay_ratio: float
    claimed_learning_rate: float
    def __init__(self, group: _Optional[str] = ..., parent: _Optional[_Union[GroupValues, _Mapping]] = ..., points: _Optional[_Iterable[_Union[RatePoint, _Mapping]]] = ..., learning_rate_ratio: _Optional[float] = ..., momentum_ratio: _Optional[float] = ..., weight_decay_ratio: _Optional[float] = ..., claimed_learning_rate: _Optional[float] = ...) -> None: ...

class RatePoint(_message.Message):
    __slots__ = ("step", "values")
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    step: int
    values: GroupValues
    def __init__(self, step: _Optional[int] = ..., values: _Optional[_Union[GroupValues, _Mapping]] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec", "request_id", "validate_only", "inherit")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    INHERIT_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    request_id: str
    validate_only: bool
    inherit: bool
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., request_id: _Optional[str] = ..., validate_only: _Optional[bool] = ..., inherit: _Optional[bool] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job", "plan")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    job: Job
    plan: Plan
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class PlanJobRequest(_message.Message):
    __slots__ = ("spec", "inherit", "device")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    INHERIT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    inherit: bool
    device: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., inherit: _Optional[bool] = ..., device: _Optional[str] = ...) -> None: ...

class PlanJobResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "states")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[JobState]
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[JobState, str]]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id", "cursor")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    cursor: int
    def __init__(self, job_id: _Optional[str] = ..., cursor: _Optional[int] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("cursor", "time", "attempt", "event", "point")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    cursor: int
    time: _timestamp_pb2.Timestamp
    attempt: int
    event: Event
    point: MetricPoint
    def __init__(self, cursor: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attempt: _Optional[int] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., point: _Optional[_Union[MetricPoint, _Mapping]] = ...) -> None: ...

class StreamLogsRequest(_message.Message):
    __slots__ = ("job_id", "attempt", "rank", "follow")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    attempt: int
    rank: int
    follow: bool
    def __init__(self, job_id: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class StreamLogsResponse(_message.Message):
    __slots__ = ("attempt", "rank", "time", "line")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    rank: int
    time: _timestamp_pb2.Timestamp
    line: str
    def __init__(self, attempt: _Optional[int] = ..., rank: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., line: _Optional[str] = ...) -> None: ...

class PauseJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class PauseJobResponse(_message.Message):
    __slots__ = ("job", "final_checkpoint")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FINAL_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    job: Job
    final_checkpoint: FinalCheckpoint
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., final_checkpoint: _Optional[_Union[FinalCheckpoint, _Mapping]] = ...) -> None: ...

class ResumeJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ResumeJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job", "final_checkpoint")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FINAL_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    job: Job
    final_checkpoint: FinalCheckpoint
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., final_checkpoint: _Optional[_Union[FinalCheckpoint, _Mapping]] = ...) -> None: ...

class FinalCheckpoint(_message.Message):
    __slots__ = ("checkpoint", "manifest_sha256", "reason")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    checkpoint: CheckpointRef
    manifest_sha256: str
    reason: str
    def __init__(self, checkpoint: _Optional[_Union[CheckpointRef, _Mapping]] = ..., manifest_sha256: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class UpdateJobRequest(_message.Message):
    __slots__ = ("job_id", "priority", "retention")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    priority: int
    retention: CheckpointSpec
    def __init__(self, job_id: _Optional[str] = ..., priority: _Optional[int] = ..., retention: _Optional[_Union[CheckpointSpec, _Mapping]] = ...) -> None: ...

class UpdateJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class DeleteJobRequest(_message.Message):
    __slots__ = ("job_id", "delete_checkpoints")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    DELETE_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    delete_checkpoints: bool
    def __init__(self, job_id: _Optional[str] = ..., delete_checkpoints: _Optional[bool] = ...) -> None: ...

class DeleteJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("ref", "size_bytes", "create_time", "validation_bpb", "uri")
    REF_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_BPB_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    ref: CheckpointRef
    size_bytes: int
    create_time: _timestamp_pb2.Timestamp
    validation_bpb: float
    uri: str
    def __init__(self, ref: _Optional[_Union[CheckpointRef, _Mapping]] = ..., size_bytes: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., validation_bpb: _Optional[float] = ..., uri: _Optional[str] = ...) -> None: ...

class VerifyCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    def __init__(self, checkpoint: _Optional[str] = ...) -> None: ...

class VerifyCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint", "problems")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    def __init__(self, checkpoint: _Optional[str] = ...) -> None: ...

class DeleteCheckpointResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ImportCheckpointRequest(_message.Message):
    __slots__ = ("source", "spec")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    source: str
    spec: JobSpec
    def __init__(self, source: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ...) -> None: ...

class ImportCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class ExportCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint", "target", "format")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    target: str
    format: str
    def __init__(self, checkpoint: _Optional[str] = ..., target: _Optional[str] = ..., format: _Optional[str] = ...) -> None: ...

class ExportCheckpointResponse(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, files: _Optional[_Iterable[str]] = ...) -> None: ...

class GetLineageRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetLineageResponse(_message.Message):
    __slots__ = ("ancestors", "forks")
    ANCESTORS_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    ancestors: _containers.RepeatedCompositeFieldContainer[Ancestor]
    forks: _containers.RepeatedCompositeFieldContainer[Fork]
    def __init__(self, ancestors: _Optional[_Iterable[_Union[Ancestor, _Mapping]]] = ..., forks: _Optional[_Iterable[_Union[Fork, _Mapping]]] = ...) -> None: ...

class Ancestor(_message.Message):
    __slots__ = ("job_id", "name", "start_step", "end_step")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    END_STEP_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    name: str
    start_step: int
    end_step: int
    def __init__(self, job_id: _Optional[str] = ..., name: _Optional[str] = ..., start_step: _Optional[int] = ..., end_step: _Optional[int] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("job_id", "name", "parent_job_id", "start_step", "end_step")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    END_STEP_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    name: str
    parent_job_id: str
    start_step: int
    end_step: int
    def __init__(self, job_id: _Optional[str] = ..., name: _Optional[str] = ..., parent_job_id: _Optional[str] = ..., start_step: _Optional[int] = ..., end_step: _Optional[int] = ...) -> None: ...

class ListMetricsRequest(_message.Message):
    __slots__ = ("job_id", "start_step", "end_step", "max_points")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    END_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_POINTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    start_step: int
    end_step: int
    max_points: int
    def __init__(self, job_id: _Optional[str] = ..., start_step: _Optional[int] = ..., end_step: _Optional[int] = ..., max_points: _Optional[int] = ...) -> None: ...

class ListMetricsResponse(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[MetricPoint]
    def __init__(self, points: _Optional[_Iterable[_Union[MetricPoint, _Mapping]]] = ...) -> None: ...

class CompareJobsRequest(_message.Message):
    __slots__ = ("job_ids",)
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class CompareJobsResponse(_message.Message):
    __slots__ = ("differences", "curves", "validation_refused")
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    CURVES_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_REFUSED_FIELD_NUMBER: _ClassVar[int]
    differences: _containers.RepeatedCompositeFieldContainer[SpecDifference]
    curves: _containers.RepeatedCompositeFieldContainer[Curve]
    validation_refused: str
    def __init__(self, differences: _Optional[_Iterable[_Union[SpecDifference, _Mapping]]] = ..., curves: _Optional[_Iterable[_Union[Curve, _Mapping]]] = ..., validation_refused: _Optional[str] = ...) -> None: ...

class SpecDifference(_message.Message):
    __slots__ = ("field", "values")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    field: str
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, field: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...

class Curve(_message.Message):
    __slots__ = ("job_id", "steps", "validation_bpb", "name", "loss_steps", "loss", "in_force", "start_step", "end_step", "tokens", "train_s", "lineage", "evaluation_set")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_BPB_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOSS_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    END_STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_SET_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    steps: _containers.RepeatedScalarFieldContainer[int]
    validation_bpb: _containers.RepeatedScalarFieldContainer[float]
    name: str
    loss_steps: _containers.RepeatedScalarFieldContainer[int]
    loss: _containers.RepeatedScalarFieldContainer[float]
    in_force: _containers.RepeatedCompositeFieldContainer[GroupValues]
    start_step: int
    end_step: int
    tokens: int
    train_s: float
    lineage: _containers.RepeatedCompositeFieldContainer[Ancestor]
    evaluation_set: str
    def __init__(self, job_id: _Optional[str] = ..., steps: _Optional[_Iterable[int]] = ..., validation_bpb: _Optional[_Iterable[float]] = ..., name: _Optional[str] = ..., loss_steps: _Optional[_Iterable[int]] = ..., loss: _Optional[_Iterable[float]] = ..., in_force: _Optional[_Iterable[_Union[GroupValues, _Mapping]]] = ..., start_step: _Optional[int] = ..., end_step: _Optional[int] = ..., tokens: _Optional[int] = ..., train_s: _Optional[float] = ..., lineage: _Optional[_Iterable[_Union[Ancestor, _Mapping]]] = ..., evaluation_set: _Optional[str] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("nodes", "waiting", "seen_time")
    NODES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SEEN_TIME_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    waiting: _containers.RepeatedCompositeFieldContainer[WaitingJob]
    seen_time: _timestamp_pb2.Timestamp
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., waiting: _Optional[_Iterable[_Union[WaitingJob, _Mapping]]] = ..., seen_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class WaitingJob(_message.Message):
    __slots__ = ("job_id", "job_name", "reason")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    job_name: str
    reason: str
    def __init__(self, job_id: _Optional[str] = ..., job_name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class NodeShare(_message.Message):
    __slots__ = ("job_id", "job_name", "workers", "gpus", "cpus")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_NAME_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    job_name: str
    workers: int
    gpus: int
    cpus: int
    def __init__(self, job_id: _Optional[str] = ..., job_name: _Optional[str] = ..., workers: _Optional[int] = ..., gpus: _Optional[int] = ..., cpus: _Optional[int] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "address", "gpus", "gpus_free", "cpus", "cpus_free", "job_ids", "gpu_type", "shares", "devices", "unused_because")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FREE_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    CPUS_FREE_FIELD_NUMBER: _ClassVar[int]
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    GPU_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    UNUSED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    gpus: int
    gpus_free: int
    cpus: int
    cpus_free: int
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    gpu_type: str
    shares: _containers.RepeatedCompositeFieldContainer[NodeShare]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceSample]
    unused_because: str
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., gpus: _Optional[int] = ..., gpus_free: _Optional[int] = ..., cpus: _Optional[int] = ..., cpus_free: _Optional[int] = ..., job_ids: _Optional[_Iterable[str]] = ..., gpu_type: _Optional[str] = ..., shares: _Optional[_Iterable[_Union[NodeShare, _Mapping]]] = ..., devices: _Optional[_Iterable[_Union[DeviceSample, _Mapping]]] = ..., unused_because: _Optional[str] = ...) -> None: ...

class DrainNodeRequest(_message.Message):
    __slots__ = ("node_id", "undo")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    undo: bool
    def __init__(self, node_id: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class DrainNodeResponse(_message.Message):
    __slots__ = ("job_ids",)
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SampleCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint", "prompt", "max_tokens", "temperature", "top_k", "seed")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    seed: int
    def __init__(self, checkpoint: _Optional[str] = ..., prompt: _Optional[str] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class SampleCheckpointResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class PutFileRequest(_message.Message):
    __slots__ = ("file", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: FileHeader
    data: bytes
    def __init__(self, file: _Optional[_Union[FileHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class FileHeader(_message.Message):
    __slots__ = ("folder", "name", "size_bytes", "sha256", "overwrite")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    folder: str
    name: str
    size_bytes: int
    sha256: str
    overwrite: bool
    def __init__(self, folder: _Optional[str] = ..., name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., overwrite: _Optional[bool] = ...) -> None: ...

class PutFileResponse(_message.Message):
    __slots__ = ("present", "stored_bytes", "uri")
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    present: bool
    stored_bytes: int
    uri: str
    def __init__(self, present: _Optional[bool] = ..., stored_bytes: _Optional[int] = ..., uri: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "name", "role", "create_time", "revoke_time")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    REVOKE_TIME_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    role: Role
    create_time: _timestamp_pb2.Timestamp
    revoke_time: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., revoke_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("name", "role")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ...) -> None: ...

class CreateTokenResponse(_message.Message):
    __slots__ = ("token", "secret")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    token: Token
    secret: str
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., secret: _Optional[str] = ...) -> None: ...

class ListTokensRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTokensResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RevokeTokenResponse(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: Token
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("hello", "entries")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    entries: _containers.RepeatedCompositeFieldContainer[ReportEntry]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., entries: _Optional[_Iterable[_Union[ReportEntry, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("job_id", "attempt", "start_step", "node_id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    attempt: int
    start_step: int
    node_id: str
    def __init__(self, job_id: _Optional[str] = ..., attempt: _Optional[int] = ..., start_step: _Optional[int] = ..., node_id: _Optional[str] = ...) -> None: ...

class ReportEntry(_message.Message):
    __slots__ = ("sequence", "time", "event", "point")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: _timestamp_pb2.Timestamp
    event: Event
    point: MetricPoint
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., point: _Optional[_Union[MetricPoint, _Mapping]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("acknowledged_sequence", "directive")
    ACKNOWLEDGED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    acknowledged_sequence: int
    directive: Directive
    def __init__(self, acknowledged_sequence: _Optional[int] = ..., directive: _Optional[_Union[Directive, str]] = ...) -> None: ...
