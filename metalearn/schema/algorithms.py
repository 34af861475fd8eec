"""Keys of the meta-algorithms."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from metalearn.schema.groups import BN_MODES
from metalearn.schema.keys import fields_of, key, show

Config = dict[str, Any]
STEPS = frozenset({"inner_steps", "test_steps", "inner_loss_reduction"})  # of no use where nothing is descended
ALPHA_WORDS = ("auto", "online")
"""How an inner learning rate may be given besides by a number: estimated once before training, or at every meta-step.
`Algorithm.alpha_words` says which of them an algorithm takes."""
SIZES = {"3x_single": 3, "3x_tsa": 9}
"""How many times as many parameters a larger network has: the paper's "3x larger than TSA-MAML" has two readings."""


def rate(default: float, doc: str, **bounds: float) -> Any:
    """A field for an inner learning rate: a number, or one of `ALPHA_WORDS`."""
    return key(default, doc, words=ALPHA_WORDS, **bounds)


@dataclass
class Algorithm:
    """What all algorithms share; see `metalearn.learner.MetaLearner`."""

    target: ClassVar[str]
    epoch: ClassVar[int] = 1
    needs_head: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    keyless: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the class that it has no use for, and that have no key."""
    displaces: ClassVar[bool] = False
    """Whether a task's adapted parameters are parameters of the network (what `outer_vector=displacement` needs)."""
    alpha_words: ClassVar[frozenset[str]] = frozenset()
    """Those of `ALPHA_WORDS` that `alpha` may be."""
    prepares: ClassVar[str | None] = None
    """The key that counts training tasks which are gone through before the first meta-step, if there are any."""

    name: str = key("", "name in tables and logs", touches="none")
    outer: str = key(
        "mean",
        "how the tasks' outer gradients are combined: mean, or gradient agreement",
        choices=("mean", "agreement"),
    )
    outer_vector: str = key(
        "displacement",
        "what agrees or not (outer=agreement): theta - phi of the adapted parameters, or the tasks' outer gradients",
        choices=("displacement", "meta_grad"),
    )
    outer_clip: float | None = key(
        None, "bound on the vectors' norms as a multiple of their median (outer=agreement); null for none", gt=0
    )
    outer_drop: bool = key(False, "leave out tasks that are not finite instead of stopping (outer=agreement)")
    bn_modes: list[str] = key(
        ["batch", "support_plus_one"], "default of evaluation.bn_modes", choices=BN_MODES, touches="none"
    )

    @classmethod
    def needs(cls, run: Config) -> Iterator[Config | tuple[str, str]]:
        """What a run's training starts from: configurations of runs, or keys and the checkpoints that they name."""
        yield from ()

    @classmethod
    def keeps_head(cls, algorithm: Config) -> bool:
        """Whether the head that is learned is the one that new tasks begin with."""
        return cls.needs_head

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        """Combinations of keys that cannot be."""
        if (word := algorithm.get("alpha")) in ALPHA_WORDS and word not in cls.alpha_words:
            words = "".join(f" or {w}" for w in ALPHA_WORDS if w in cls.alpha_words)
            yield f"algorithm.alpha={word}: must be a number{words} with algorithm={algorithm['name']}"
        if algorithm["outer"] == "mean":
            for name in ("outer_vector", "outer_clip", "outer_drop"):
                if algorithm[name] != fields_of(cls)[name].default:
                    yield f"algorithm.{name}={algorithm[name]}: needs algorithm.outer=agreement"
        elif run["trainer"]["devices"] > 1:
            yield f"trainer.devices={run['trainer']['devices']}: must be 1 with algorithm.outer={algorithm['outer']}"
        elif algorithm["outer_vector"] == "displacement" and not cls.displaces:
            yield (
                f"algorithm.outer_vector=displacement: {algorithm['name']} adapts no parameters of the network; "
                "use meta_grad"
            )


@dataclass
class Steps(Algorithm):
    """Algorithms that adapt parameters of the network step by step."""

    displaces: ClassVar[bool] = True

    inner_steps: int = key(1, "inner steps in training", ge=0)
    test_steps: int = key(3, "inner steps in validation and test", ge=0)
    inner_loss_reduction: str = key(
        "mean",
        "inner loss: mean over examples, or their sum divided by the shots (N times the mean, as in MAML's code)",
        choices=("mean", "sum_over_shots"),
    )

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        yield from _wrong_reduction(algorithm, run)


@dataclass
class InnerLoop(Steps):
    """Algorithms that adapt by gradient steps of a given size."""

    alpha: float | str = rate(0.4, "inner learning rate, for the loss that inner_loss_reduction defines", ge=0)


@dataclass
class GradientSteps(InnerLoop):
    """What `metalearn.algorithms.MAML` and the algorithms that are made of its inner loop share."""

    keyless: ClassVar[frozenset[str]] = frozenset({"variant", "minibatch", "test_alpha", "alpha_cov", "alpha_momentum"})
    alpha_words: ClassVar[frozenset[str]] = frozenset({"auto"})

    first_order: bool = key(False, "treat inner gradients as constants (FOMAML)")
    adapted: str = key("", "prefix of the parameters that the inner loop moves; empty for all, head for ANIL")
    inner_clip: float | None = key(None, "bound on each entry of an inner gradient; null for none", gt=0)
    network_size: str | None = key(
        None,
        "deeper and wider network (MAML-L) with 3 times the parameters of the chosen one, or of TSA-MAML's 3 copies of "
        "it; null for the chosen one",
        choices=tuple(SIZES),
    )

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        from metalearn.schema.registry import member_of

        yield from super().problems(algorithm, run)
        yield from _adapts_nothing(algorithm, run)
        if algorithm["alpha"] == "auto" and run["trainer"]["devices"] > 1:
            yield f"trainer.devices={run['trainer']['devices']}: must be 1 with algorithm.alpha=auto"
        size = algorithm["network_size"]
        if size is not None and not hasattr(member_of("backbone", run["backbone"]), "enlarged"):
            name = run["backbone"]["name"]
            yield f"algorithm.network_size={size}: must be null with backbone={name}, which has no larger form"


@dataclass
class MAML(GradientSteps):
    """metalearn.algorithms.MAML."""

    target: ClassVar[str] = "metalearn.algorithms.MAML"
    keyless: ClassVar[frozenset[str]] = frozenset()
    alpha_words: ClassVar[frozenset[str]] = frozenset({"auto", "online"})

    test_alpha: float | None = key(
        None,
        "inner learning rate in test, of any sign; null for alpha, which validation always has",
        touches="test",
    )
    alpha_cov: str = key(
        "gram_mean",
        "what the estimate of alpha=online divides by, for the normalised features of a support set: mean of the "
        "examples' cosines, mean of the features' second moments, or those of each feature with itself (a constant)",
        choices=("gram_mean", "feature_mean", "diag"),
    )
    alpha_momentum: float = key(0.9, "weight of the past in the moving average of alpha=online", ge=0, lt=1)
    variant: str = key(
        "query",
        "examples of training gradients, k = inner_steps: k inner ones on the support, the outer one on the query set; "
        "k minibatches of both sets, the last one outer; or k - 1 of the support set, and the query set as the last",
        choices=("query", "last_minibatch", "tail"),
    )
    minibatch: int | None = key(
        None, "examples of a minibatch (variant=last_minibatch and tail); null for whole sets", ge=1
    )

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        yield from _estimated_rate(algorithm, run)
        variant, batch, steps = (algorithm[name] for name in ("variant", "minibatch", "inner_steps"))
        if variant == "query" and batch is not None:
            yield f"algorithm.minibatch={batch}: needs algorithm.variant=last_minibatch or tail"
        if variant != "query" and steps == 0:
            yield f"algorithm.inner_steps=0: must be >= 1 with algorithm.variant={variant}, for a last minibatch"


def _estimated_rate(algorithm: Config, run: Config) -> Iterator[str]:
    """Why alpha cannot be a running estimate, or has no use for what that depends on, if so."""
    if algorithm["alpha"] != "online":
        for name in ("alpha_cov", "alpha_momentum"):
            if algorithm[name] != fields_of(MAML)[name].default:
                yield f"algorithm.{name}={algorithm[name]}: needs algorithm.alpha=online"
        return
    needed = {"adapted": "head", "variant": "query", "inner_loss_reduction": "mean"}
    for name, value in needed.items():
        if algorithm[name] != value:
            yield f"algorithm.alpha=online: needs algorithm.{name}={value}, for which the rate is estimated"
    if run["trainer"]["max_steps"] == 0:
        yield "algorithm.alpha=online: needs trainer.max_steps >= 1, because training estimates the rate"


@dataclass
class IMAML(InnerLoop):
    """metalearn.algorithms.IMAML."""

    target: ClassVar[str] = "metalearn.algorithms.IMAML"

    alpha: float | str = rate(
        0.1, "step size of the inner solver, for the loss that inner_loss_reduction defines", ge=0
    )
    inner_steps: int = key(16, "steps of the inner solver in training", ge=0)
    test_steps: int = key(16, "steps of the inner solver in validation and test", ge=0)
    lam: float = key(2.0, "weight lambda of the proximal term lambda/2 |phi - theta|^2", gt=0)
    inner_solver: str = key(
        "prox_gd",
        "gradient steps on loss and proximal term; official: on the loss, and then one on the proximal term alone",
        choices=("prox_gd", "official"),
    )
    test_lam: float | None = key(None, "lambda while adapting in validation and test; null for lam", ge=0)
    adapted: str = key("", "prefix of the parameters that the inner loop moves; empty for all")
    cg_steps: int = key(5, "most steps of conjugate gradient", ge=1)
    cg_tolerance: float = key(1e-10, "squared residual, relative to that of zero, at which a task's steps end", ge=0)
    cg_damping: float = key(0.0, "added to 1 in the system (1 + H / lambda) g = b; the authors' code: 1", ge=0)
    lam_damping: float = key(0.0, "added to lambda in that system; the authors' code: 10", ge=0)

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        yield from _adapts_nothing(algorithm, run)
        alpha = algorithm["alpha"]
        for name in ("lam", "test_lam"):
            if isinstance(alpha, float) and alpha * (algorithm[name] or 0) >= 2:
                bound = f"2 / algorithm.{name} = {2 / algorithm[name]:g}"
                yield f"algorithm.alpha={alpha}: must be < {bound}, or the proximal term alone diverges"


def _wrong_reduction(algorithm: Config, run: Config) -> Iterator[str]:
    """Why `inner_loss_reduction` has no meaning, if so."""
    if algorithm["inner_loss_reduction"] != "mean" and _kind(run) == "regression":
        yield "algorithm.inner_loss_reduction=sum_over_shots: only for classification; use mean for regression"


def _kind(run: Config) -> str:
    from metalearn.schema.registry import member_of

    return str(member_of("dataset", run["dataset"]).kind_of(run["dataset"]))


def _adapts_nothing(algorithm: Config, run: Config) -> Iterator[str]:
    """Why `adapted` begins no layer's name, if so."""
    from metalearn.schema.registry import member_of

    adapted, layers = algorithm["adapted"], member_of("backbone", run["backbone"]).layers(run["backbone"])
    if layers and not any(f"{layer}.".startswith(adapted) or adapted.startswith(f"{layer}.") for layer in layers):
        yield f"algorithm.adapted={adapted}: must be empty or begin the name of one of {', '.join(layers)}"


@dataclass
class ERM(Algorithm):
    """metalearn.algorithms.ERM."""

    target: ClassVar[str] = "metalearn.algorithms.ERM"
    keyless: ClassVar[frozenset[str]] = GradientSteps.keyless | {"inner_steps", "first_order"}

    form: str | None = key(
        None,
        "classification: one head for all training classes, replaced in test (global; null means this), or labels that "
        "mean the same in all training tasks (fixed_label)",
        choices=("global", "fixed_label"),
    )
    new_head: str = key(
        "zero",
        "initial weights of a new task's head (form=global): zero, or drawn for each task",
        choices=("zero", "drawn"),
    )
    alpha: float | str = rate(0.4, "learning rate of fine-tuning, for the loss that inner_loss_reduction defines", ge=0)
    test_steps: int = key(3, "steps of fine-tuning in validation and test", ge=0)
    inner_loss_reduction: str = key(
        "mean",
        "loss of fine-tuning: mean over examples, or their sum divided by the shots (N times the mean)",
        choices=("mean", "sum_over_shots"),
    )
    adapted: str = key("", "prefix of the parameters that fine-tuning moves; empty for all, head for the last layer")
    inner_clip: float | None = key(None, "bound on each entry of a gradient in fine-tuning; null for none", gt=0)

    @classmethod
    def keeps_head(cls, algorithm: Config) -> bool:
        return bool(algorithm["form"] == "fixed_label")

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        yield from _wrong_reduction(algorithm, run)
        yield from _adapts_nothing(algorithm, run)
        form, kind, adapted = algorithm["form"], _kind(run), algorithm["adapted"]
        replaces = kind == "classification" and form != "fixed_label"
        if form is not None and kind == "regression":
            yield f"algorithm.form={form}: only for classification; leave it out for regression"
        if form == "fixed_label" and run["dataset"].get("label_assignment") != "fixed_label":
            yield "algorithm.form=fixed_label: needs dataset.label_assignment=fixed_label"
        if algorithm["new_head"] != "zero" and not replaces:
            yield f"algorithm.new_head={algorithm['new_head']}: needs classification with algorithm.form=global"
        if replaces and adapted and not adapted.startswith("head") and run["backbone"].get("factory") is None:
            yield f"algorithm.adapted={adapted}: must be empty or head, which algorithm.form=global replaces"


@dataclass
class MetaSGD(MAML):
    """metalearn.algorithms.MetaSGD."""

    target: ClassVar[str] = "metalearn.algorithms.MetaSGD"
    alpha_words: ClassVar[frozenset[str]] = frozenset({"auto"})

    alpha: float | str = rate(0.1, "initial inner learning rate of every parameter (rate_init=constant)", ge=0)
    test_steps: int = key(1, "inner steps in validation and test; rates are learned for as many as in training", ge=0)
    rate_init: str = key(
        "constant", "initial rates: alpha, or draws from U(0.005, 0.1)", choices=("constant", "uniform")
    )

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        if algorithm["test_alpha"] is not None:
            yield f"algorithm.test_alpha={algorithm['test_alpha']}: must be null with meta_sgd, which learns its rates"
        if (algorithm["alpha"], algorithm["rate_init"]) == ("auto", "uniform"):
            yield "algorithm.rate_init=uniform: must be constant with algorithm.alpha=auto, which it would not use"


@dataclass
class HSML(GradientSteps):
    """metalearn.algorithms.HSML."""

    target: ClassVar[str] = "metalearn.algorithms.HSML"
    displaces: ClassVar[bool] = False

    hidden: int = key(128, "width of the task embedding and of all clusters' values", ge=1)
    tree: list[int] = key([4, 2, 1], "clusters of each layer, from the leaves to the root", ge=1)
    sigma: float = key(10.0, "softness s of the leaves: their weights are the softmax of -|g - mu|^2 / (2 s)", gt=0)
    encoder: str = key(
        "rnn", "task embedding: a GRU autoencoder, or one that ignores the order of examples", choices=("rnn", "mean")
    )
    embedded: int | None = key(
        None, "support examples that the task embedding sees, one of each class after another; null for all", ge=1
    )
    xi: float = key(0.01, "weight of the autoencoder's reconstruction error in the outer loss", ge=0)
    gate_bias: float = key(0.0, "initial bias of the gates: 0 halves every weight at first, 2 keeps 0.88 of it")
    example_filters: int = key(32, "filters of the two convolutions that embed a picture", ge=1)
    example_widths: list[int] = key([384, 64], "widths of the dense layers that embed an example", ge=1)

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        if len(algorithm["tree"]) < 2 or algorithm["tree"][-1] != 1:
            yield f"algorithm.tree={show(algorithm['tree'])}: must have at least two layers, and end with the root, 1"
        if not algorithm["example_widths"]:
            yield "algorithm.example_widths=[]: must have at least one layer"


@dataclass
class MMAML(GradientSteps):
    """metalearn.algorithms.MMAML."""

    target: ClassVar[str] = "metalearn.algorithms.MMAML"

    hidden: int = key(128, "width of the task embedding (of each direction for rnn)", ge=1)
    encoder: str = key(
        "mean", "over the support set: mean of its examples' embeddings, or two GRUs", choices=("mean", "rnn")
    )
    inner_clip: float | None = key(20.0, "bound on each entry of an inner gradient; null for none", gt=0)
    example_filters: int = key(32, "filters of the first of the convolutions that embed a picture", ge=1)


@dataclass
class TSAMAML(GradientSteps):
    """metalearn.algorithms.TSAMAML."""

    target: ClassVar[str] = "metalearn.algorithms.TSAMAML"
    displaces: ClassVar[bool] = False
    prepares: ClassVar[str | None] = "tasks"

    m: int = key(3, "groups of tasks, each with an initialisation", ge=1)
    tasks: int = key(1000, "training tasks that are clustered before training", ge=1)
    id_steps: int = key(10, "inner steps from MAML's solution that identify a task", ge=1)
    cluster_params: str = key(
        "all", "adapted parameters that tasks are compared by: all, body or head", choices=("all", "body", "head")
    )
    routing: str = key(
        "initial",
        "what a task is compared with: the initial centres, or the current initialisations (which collapses)",
        choices=("initial", "current"),
    )
    batching: str = key(
        "per_group_queue",
        "outer updates: of one group as soon as meta_batch_size of its tasks wait, or of all groups at each meta-step",
        choices=("per_group_queue", "mixed"),
    )
    collapse_steps: int = key(
        500, "updates after which routing=current stops if one group took over 95 % of their tasks; 0 for never", ge=0
    )
    pretrain_steps: int = key(500, "meta-steps of the MAML run that comes first", ge=0)
    pretrain_schedule: str = key(
        "constant", "optimizer.schedule of that run", choices=("constant", "cosine", "linear", "step")
    )
    pretrained: str | None = key(
        None, "folder of a finished MAML cell, or a checkpoint file, to start from instead", touches="none"
    )

    @classmethod
    def needs(cls, run: Config) -> Iterator[Config | tuple[str, str]]:
        """A run of MAML with the same keys."""
        algorithm = run["algorithm"]
        if algorithm["pretrained"] is not None:
            yield "algorithm.pretrained", algorithm["pretrained"]
            return
        defaults = {k: field.default for k, field in fields_of(MAML).items()}
        own = {k: algorithm[k] for k in fields_of(GradientSteps)}
        first = {"_target_": MAML.target} | defaults | own | {"name": "maml"}
        changes = {
            "algorithm": first,
            "trainer": run["trainer"] | {"max_steps": algorithm["pretrain_steps"]},
            "optimizer": run["optimizer"] | {"schedule": algorithm["pretrain_schedule"]},
            "rerun": False,
        }
        yield run | changes

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        if run["trainer"]["devices"] > 1:
            yield f"trainer.devices={run['trainer']['devices']}: must be 1 with tsa_maml"
        if algorithm["tasks"] < algorithm["m"]:
            yield f"algorithm.tasks={algorithm['tasks']}: must be >= algorithm.m={algorithm['m']}"
        for name in ("alpha", "id_steps"):
            if algorithm["m"] > 1 and not algorithm[name]:
                yield f"algorithm.{name}={algorithm[name]}: must be > 0 with algorithm.m > 1, or no two tasks differ"


@dataclass
class TNet(MAML):
    """metalearn.algorithms.TNet."""

    target: ClassVar[str] = "metalearn.algorithms.TNet"
    alpha_words: ClassVar[frozenset[str]] = frozenset({"auto"})

    test_steps: int = key(
        1, "inner steps in validation and test; the metric is learned for as many as in training", ge=0
    )


@dataclass
class MTNet(TNet):
    """metalearn.algorithms.MTNet."""

    target: ClassVar[str] = "metalearn.algorithms.MTNet"


@dataclass
class MetaLSTM(Steps):
    """metalearn.algorithms.MetaLSTM."""

    target: ClassVar[str] = "metalearn.algorithms.MetaLSTM"

    inner_steps: int = key(12, "steps T of the learned optimizer in training", ge=0)
    test_steps: int = key(12, "steps of the learned optimizer in validation and test", ge=0)
    hidden: int = key(20, "width of the optimizer's LSTM", ge=1)
    inner_batch: int | None = key(None, "examples of a minibatch; null for the whole support set", ge=1)
    divide_grad_by_batch: bool = key(
        False, "divide the gradient of the mean loss by the size of the minibatch once more, as the released code does"
    )
    preprocess_p: float = key(10.0, "gradients and losses below e^-p are not taken to their logarithm", gt=0)
    bn_momentum: float = key(0.9, "weight of the newest minibatch in an episode's running averages", gt=0, le=1)
    bn_modes: list[str] = key(["running", "batch"], "default of evaluation.bn_modes", choices=BN_MODES, touches="none")


@dataclass
class Reptile(InnerLoop):
    """metalearn.algorithms.Reptile."""

    target: ClassVar[str] = "metalearn.algorithms.Reptile"

    alpha: float | str = rate(0.001, "learning rate of the inner optimizer", gt=0)
    inner_steps: int = key(5, "inner steps in training", ge=1)
    test_steps: int = key(50, "inner steps in validation and test", ge=0)
    inner_optimizer: str = key("adam", "inner optimizer; adam has beta1 = 0, beta2 = 0.999", choices=("adam", "sgd"))
    inner_state: str = key("carry", "Adam's second moments at the start of a task", choices=("carry", "reset"))
    inner_batch: int | None = key(10, "examples of a minibatch in training; null for the whole pool", ge=1)
    test_inner_batch: int | None = key(5, "examples of a minibatch in evaluation; null for the support set", ge=1)
    serial: bool = key(False, "update theta after each task of a meta-batch instead of once for all")
    bn_modes: list[str] = key(
        ["support_plus_one", "batch"], "default of evaluation.bn_modes", choices=BN_MODES, touches="none"
    )

    @classmethod
    def problems(cls, algorithm: Config, run: Config) -> Iterator[str]:
        yield from super().problems(algorithm, run)
        if run["backbone"].get("bn_affine", "none") != "none" and not run["backbone"]["bn_affine_inner"]:
            yield "backbone.bn_affine_inner=false: must be true with reptile, which learns what its inner loop moves"


@dataclass
class ProtoNet(Algorithm):
    """metalearn.algorithms.ProtoNet."""

    target: ClassVar[str] = "metalearn.algorithms.ProtoNet"
    needs_head: ClassVar[bool] = False
    keyless: ClassVar[frozenset[str]] = STEPS

    bn_modes: list[str] = key(["running", "batch"], "default of evaluation.bn_modes", choices=BN_MODES, touches="none")


@dataclass
class MatchingNet(Algorithm):
    """metalearn.algorithms.MatchingNet."""

    target: ClassVar[str] = "metalearn.algorithms.MatchingNet"
    epoch: ClassVar[int] = 2  # context embeddings of chunks on threads were wrong before
    needs_head: ClassVar[bool] = False
    keyless: ClassVar[frozenset[str]] = STEPS
    kinds: ClassVar[tuple[str, ...]] = ("classification",)

    attention: str = key(
        "softmax",
        "class scores: attention over the support set, or sums of cosines as logits",
        choices=("softmax", "sum_cos"),
    )
    scale: float = key(1.0, "factor of the cosines (an inverse temperature)", gt=0)
    context: bool = key(False, "full context embeddings: LSTMs over the support set and over reads of it")
    reads: int = key(3, "steps of the query's LSTM (context=true)", ge=1)
    bn_modes: list[str] = key(["running", "batch"], "default of evaluation.bn_modes", choices=BN_MODES, touches="none")


ALGORITHMS = (ERM, MAML, MetaSGD, TNet, MTNet, HSML, MMAML, TSAMAML, Reptile, ProtoNet, MatchingNet, IMAML, MetaLSTM)
