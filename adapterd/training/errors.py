"""What can end a training run, besides bad rows and settings. No torch: the command line knows these too."""

from adapterd.errors import AdapterdError


class TrainingDiverged(AdapterdError):
    """The loss, the gradient or a weight stopped being a number; nothing was published."""

    status = 400
    code = "training_diverged"


class TrainingInterrupted(AdapterdError):
    """Asked to stop, and stopped: a checkpoint holds all that was done. The same command goes on from it."""

    code = "training_interrupted"


class ResumeRefused(AdapterdError):
    """A checkpoint of the same name is there, of other rows, settings or another base; the message names which."""

    status = 409
    code = "resume_refused"


class RoundTripFailed(AdapterdError):
    """The adapter, loaded as the server loads it, does not answer as it did in training; nothing was published."""

    code = "round_trip_failed"
