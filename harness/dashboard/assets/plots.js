// The pictures of a run, the main ones first. Names of metrics are as the server gives them.
export const plotsOf = ({ metric, prefix }, maxNorm) => [
  { title: "loss", isMain: true, lines: [{ name: metric.TRAIN_LOSS, label: "training" }, { name: metric.VAL_LOSS, label: "held out", colour: "#ff725c" }] },
  { title: "accuracy", isMain: true, lines: [{ name: metric.TRAIN_ACCURACY, label: "training" }, { name: metric.VAL_ACCURACY, label: "held out", colour: "#ff725c" }] },
  { title: "learning rate", isMain: true, lines: [{ name: metric.LR, label: "learning rate" }] },
  {
    title: "gradient norm",
    isMain: true,
    lines: [{ name: metric.GRAD_NORM, label: "before clipping" }, { name: metric.GRAD_NORM_CLIPPED, label: "after clipping", colour: "#3ca951" }],
    threshold: { value: maxNorm },
    log: true,
  },
  { title: "NaN and Inf in gradients", isMain: true, lines: [{ name: metric.NUM_NAN, label: "NaN" }, { name: metric.NUM_INF, label: "Inf", colour: "#ff725c" }] },
  { title: "skipped steps", lines: [{ name: metric.SKIPS, label: "skips" }] },
  { title: "clipped share", lines: [{ name: metric.CLIP_FRAC, label: "share of steps clipped" }] },
  { title: "spike score", lines: [{ name: metric.SPIKE_SCORE, label: "robust z" }] },
  { title: "loss scale", lines: [{ name: metric.LOSS_SCALE, label: "loss scale" }], log: true },
  { title: "tokens per second", lines: [{ name: metric.TOKENS_PER_S, label: "tokens/s" }] },
  { title: "model FLOP utilisation", lines: [{ name: metric.MFU_FRAC, label: "MFU" }, { name: metric.HFU_FRAC, label: "HFU, with what is recomputed" }] },
  {
    title: "time per step (s)",
    lines: [
      { name: metric.STEP_S, label: "step" },
      { name: metric.COMPUTE_S, label: "compute" },
      { name: metric.DATA_WAIT_S, label: "waiting for data" },
      { name: metric.CHECKPOINT_BLOCKED_S, label: "blocked by checkpoints" },
    ],
  },
  ...["compute_s", "data_wait_s", "loss", "grad_norm"].map((name) => ({
    title: `ranks: ${name.replace("_s", " (s)").replace("_", " ")}`,
    lines: ["max", "mean", "min"].map((part) => ({ name: `${prefix.RANKS}${name}/${part}`, label: part })),
  })),
];
