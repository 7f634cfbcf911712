"""What a recipe and the commands may say: the sections every method shares.

Pure pydantic, no torch: a wrong line is refused before anything heavy is imported.  A method adds its own sections in
`trainers/schemas/<method>.py` as `class Recipe(RecipeBase)`.  Every field's description is what `--help` prints.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, field_validator, model_validator

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


def names_repository(text: str) -> bool:
    """Whether it is written as the Hub writes its repositories, namespace/name."""
    owner, slash, name = text.partition("/")
    return bool(slash and NAME.fullmatch(owner) and NAME.fullmatch(name))


def _number_as_text(value: Any) -> Any:
    """`run=12` reaches us as a number; names are text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_number_as_text)]


class Section(BaseModel):
    """A group of keys: closed, so that a typo is an error and never a silent default."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())


class Backbone(Section):
    """The frozen model that the module is trained for."""

    name: Text = Field(description="embedded:<name>, a folder, or a Hub id that the backbone's own library loads")
    revision: Text | None = Field(default=None, description="Hub commit or tag of the backbone; null takes the newest")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="dtype the frozen weights are held in; the learned part is float32 whatever this is",
    )


class Optimizer(Section):
    """AdamW and its schedule."""

    lr: float = Field(
        default=1e-4, gt=0, description="peak learning rate; a method may multiply it for some of its tensors"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="AdamW's two moment decay rates")
    warmup_steps: int = Field(
        default=0, ge=0, description="updates over which the learning rate rises from zero, linearly"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="course of the learning rate after warm-up: down to zero at max_steps, along a cosine or a line, "
        "or flat",
    )


Strategy = Literal[
    "auto",
    "ddp",
    "fsdp",
    "deepspeed_1",
    "deepspeed_2",
    "deepspeed_3",
    "deepspeed_1_offload",
    "deepspeed_2_offload",
    "deepspeed_3_offload",
]


class TrainerSection(Section):
    """How long, on what, and how often something is written."""

    max_steps: PositiveInt = Field(default=400, description="updates of the learned part")
    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="kind of device; auto takes a GPU if any"
    )
    devices: PositiveInt | Literal["auto"] = Field(default=1, description="processes per node, one device each")
    num_nodes: PositiveInt = Field(default=1, description="machines that train together")
    strategy: Strategy = Field(
        default="auto",
        description="how processes share the work: auto is one device, or ddp for several; fsdp shards the frozen "
        "backbone; deepspeed_1 and _2 shard optimizer state and gradients of what learns, deepspeed_3 all weights; "
        "_offload moves them to the host's memory",
    )
    timeout_s: PositiveInt = Field(default=1800, description="seconds that a rank waits for the others before it ends")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field(
        default="32-true", description="arithmetic of a step; the learned weights stay float32 in all of them"
    )
    accumulate_grad_batches: PositiveInt = Field(default=1, description="batches that make one update")
    gradient_clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    clip_by: Literal["norm", "value"] = Field(
        default="norm", description="what gradient_clip bounds: the norm of all, or every single number"
    )
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the running average that is exported; 0 keeps none"
    )
    num_workers: int = Field(
        default=0, ge=0, description="processes that prepare batches; 0 prepares them in the main one"
    )
    log_every: PositiveInt = Field(
        default=20, description="updates between two lines of metrics.csv and of the progress"
    )
    save_every: PositiveInt = Field(default=200, description="updates between two checkpoints")
    sample_every: int = Field(default=0, ge=0, description="updates between two sample grids; 0 draws none")
    profile: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        default=None,
        description="updates to record with torch.profiler into <run>/profile/: how many, after a few to warm up, or "
        "the first and the last as [100,104]; null records none and costs nothing",
    )

    @model_validator(mode="after")
    def _strategy_knows_the_precision(self) -> TrainerSection:
        if self.strategy.startswith("deepspeed") and self.precision == "16-mixed":
            raise ValueError("precision 16-mixed needs a loss scale that deepspeed has no part in: use bf16-mixed")
        return self

    @model_validator(mode="after")
    def _profile_is_reached(self) -> TrainerSection:
        if isinstance(self.profile, tuple):
            first, last = self.profile
            if not first <= last <= self.max_steps:
                raise ValueError(
                    f"profile is [{first}, {last}] but must rise and end by max_steps, {self.max_steps}: "
                    "give the first and the last update to record"
                )
        return self


class Wandb(Section):
    """The Weights & Biases run, for logger=wandb."""

    project: Text = Field(default="afterburner", description="W&B project that the run belongs to")
    entity: Text | None = Field(default=None, description="W&B user or team; null takes the default of your key")
    name: Text | None = Field(default=None, description="the run's name in W&B; null takes <recipe>/<run>")
    tags: list[Text] = Field(default=[], description="the run's tags in W&B, as [first,second]")
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto",
        description="online needs a key and a server that answers, else the run is refused; offline writes into "
        "<run>/wandb for `wandb sync`; auto is WANDB_MODE if set, else online with a key and an answering server, "
        "else offline",
    )

    @field_validator("project")
    @classmethod
    def _project_is_a_name(cls, value: str) -> str:
        if not value or set(value) & set("/\\#?%:"):
            raise ValueError("a name without any of / \\ # ? % :")
        return value


class Evaluation(Section):
    """How the exported adapter is measured."""

    inputs: PositiveInt = Field(default=64, description="held-out inputs that quality is measured on")
    batch_size: PositiveInt = Field(default=16, description="images per call of the pipeline; prompts run one by one")
    timing_batch: PositiveInt = Field(default=8, description="images, or prompts of each category, per timed call")
    prompts: Text | None = Field(
        default=None, description="text file of prompts, of which the last tenth is held out; null takes the recipe's"
    )
    new_tokens: PositiveInt = Field(default=96, description="tokens that a language model decodes for each input")
    assistant: Text | None = Field(
        default=None,
        description="small language model to compare with as transformers' assistant; null takes the "
        "embedded backbone's own, if any",
    )
    compiled: bool = Field(
        default=False,
        description="also measure plain decoding of a language model, and Medusa, with a step compiled by torch, where "
        "that works; on a CPU it needs a C++ compiler and a minute",
    )
    beside: Text | None = Field(
        default=None,
        description="adapter folder or Hub id of the other learned KV cache (locret, matryoshka_kv), to be measured "
        "together with this one",
    )
    timing_context: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        default=8192,
        description="tokens of the context behind which a learned KV cache decodes while it is timed, or a list of "
        "such lengths: reading is timed, and memory taken, at the first",
    )
    rivals: Literal["all", "family", "none"] = Field(
        default="all",
        description="diffusion: what is measured beside baseline and adapter: untrained members, peers and fewer "
        "steps; only what its own table, or solver, does without the rest of what it learned; or nothing, which is "
        "enough for a further training seed beside a report that has the others",
    )
    repeats: int = Field(default=5, ge=5, description="paired timing rounds, each with every row once")
    seed: int = Field(default=1234, description="seed of the held-out inputs and of their noise")

    @property
    def timing_contexts(self) -> list[int]:
        """Every length, one or more."""
        return self.timing_context if isinstance(self.timing_context, list) else [self.timing_context]


class RecipeBase(Section):
    """One training run: what is trained, on which backbone, how long, and where it is written."""

    recipe: Text = Field(default="", description="name of the recipe file; the command fills it in")
    method: str = Field(description="what learns: a file of this name is in modules/, trainers/ and trainers/schemas/")
    backbone: Backbone = Field(description="the frozen model")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="AdamW and its schedule")
    trainer: TrainerSection = Field(default_factory=TrainerSection, description="budget, devices, intervals")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="how the exported adapter is measured")
    logger: Literal["csv", "wandb", "none"] | list[Literal["csv", "wandb"]] = Field(
        default="csv",
        description="where metrics go: csv writes metrics.csv into the run folder, wandb logs a Weights & Biases run, "
        "[csv,wandb] does both, none neither",
    )
    wandb: Wandb = Field(default_factory=Wandb, description="the Weights & Biases run")
    seed: int = Field(default=0, ge=0, description="fixes initial weights, data order and noise")
    run: Text | None = Field(
        default=None, description="name of the run's folder; null takes the SLURM job id, else the first free number"
    )
    resume: Text | None = Field(default=None, description="folder of a run to continue, with the recipe stored there")
    evaluate: bool = Field(default=True, description="measure the adapter when training ends")
    output_dir: Text = Field(default="outputs", description="folder that holds <recipe>/<run>/")

    def logs_to(self, logger: Literal["csv", "wandb"]) -> bool:
        """Whether `logger` is the one chosen, or among them."""
        return logger in ([self.logger] if isinstance(self.logger, str) else self.logger)

    @field_validator("run")
    @classmethod
    def _run_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError("letters, digits, '.', '_' and '-', beginning with a letter or a digit")
        return value


class EvaluateConfig(Section):
    """`python -m trainers.evaluate`: measure an exported adapter against its backbone and the untrained members."""

    adapter: Text = Field(description="folder of an exported adapter, or a Hub id")
    revision: Text | None = Field(default=None, description="Hub commit or tag of the adapter; null takes the newest")
    backbone: Text | None = Field(default=None, description="backbone to load; null takes the one the adapter names")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype the backbone runs in"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where it runs; auto takes a GPU if any")
    output: Text | None = Field(
        default=None, description="folder for report.* and samples/; null: the adapter's parent folder"
    )
    evaluation: Evaluation = Field(default_factory=Evaluation, description="how the adapter is measured")


class ExportConfig(Section):
    """`python -m trainers.export`: write the adapter of a run's checkpoint once more."""

    run: Text = Field(description="folder of the run, as outputs/<recipe>/<run>")
    checkpoint: Text | None = Field(default=None, description="checkpoint file; null takes the run's newest")
    format: Text = Field(default="adapter", description="adapter, or what a serving engine reads (medusa: tgi, vllm)")
    output: Text | None = Field(default=None, description="folder to write; null writes <run>/<format>")


class PublishConfig(Section):
    """`python -m trainers.publish`: send an exported, measured adapter to the Hub."""

    adapter: Text = Field(description="folder of an exported adapter")
    repo: Text = Field(description="repository on the Hub, as namespace/name; made if there is none")
    revision: Text | None = Field(
        default=None, description="branch to publish on, made from main if there is none; null is main"
    )
    private: bool = Field(default=False, description="make a new repository private; an existing one must be already")
    license: Text | None = Field(
        default=None, description="licence as the Hub calls it (apache-2.0, mit, ...); null takes the backbone's own"
    )
    unmeasured: bool = Field(default=False, description="publish without a report, which the card then says")
    dry_run: bool = Field(default=False, description="check all, show files and card metadata, send nothing")

    @field_validator("repo")
    @classmethod
    def _repo_is_a_hub_id(cls, value: str) -> str:
        if not names_repository(value):
            raise ValueError("namespace/name, each of letters, digits, '.', '_' and '-'")
        return value

    @field_validator("revision")
    @classmethod
    def _revision_is_a_branch(cls, value: str | None) -> str | None:
        if value is not None and (COMMIT.fullmatch(value) or not all(map(NAME.fullmatch, value.split("/")))):
            raise ValueError("the name of a branch; a commit cannot be published on")
        return value


class ConvertConfig(Section):
    """`python -m trainers.convert`: make an adapter of what somebody else trained."""

    source: Text = Field(
        description="medusa: folder or Hub id with the heads, in safetensors; harmonica: file of Learning-to-Cache's "
        "released routers"
    )
    revision: Text | None = Field(default=None, description="Hub commit or tag of the source; null takes the newest")
    method: str = Field(default="medusa", description="what it is")
    backbone: Backbone = Field(description="the model that it was trained on")
    output: Text = Field(description="folder of the adapter to write")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the backbone runs")
    prompts: Text = Field(default="stdlib", description="text to calibrate on: a file, a folder, a Hub id, or stdlib")
    holdout: PositiveInt = Field(default=32, description="prompts that are decoded to calibrate")
    new_tokens: PositiveInt = Field(default=96, description="tokens decoded for each of them")


class DistillConfig(Section):
    """`python -m trainers.distill`: let a backbone answer seed prompts, for modules that learn what it would say."""

    backbone: Backbone = Field(description="the language model that answers")
    prompts: Text = Field(
        default="stdlib",
        description="a text file with one prompt a line; records with prompt, or with messages whose user turns are "
        "answered one after the other (a .jsonl file, a folder, a Hub id); or stdlib: code and prose that "
        "embedded:llama was trained on",
    )
    output: Text = Field(description="folder of the answers, a .jsonl file for every batch")
    count: PositiveInt | None = Field(
        default=None, description="how many prompts are answered; null takes all, of stdlib 2000"
    )
    max_new_tokens: PositiveInt = Field(default=256, description="tokens of the longest answer")
    temperature: float = Field(default=0.3, ge=0, description="of sampling; 0 takes the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1, description="share of the likeliest tokens that is sampled from")
    batch_size: PositiveInt = Field(default=16, description="prompts that are answered at a time")
    seed: int = Field(default=0, ge=0, description="with the number of its prompt, fixes every answer")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where it runs; auto takes a GPU if any")
