"""One file a model; the file name is its name.

A model's file has ``PARAMS``, a dict of ``spec.Param``: the default is trial 0 of every study, the
distribution is the range of a study and the rule of ``train``'s command line. And it has
``fit(params, train, val, seed, report) -> spec.Fitted``, which calls ``report`` after every step.
Heavy libraries are imported inside ``fit``: a driver reads ``PARAMS`` without loading TensorFlow.
``PRELOAD`` may name modules that a sweep imports once, before it forks the trials.
"""
