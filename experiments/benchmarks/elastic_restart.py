r"""What failures cost a supervised run, and that they do not change its losses.

python -m experiments.benchmarks.elastic_restart

Trains the same model three times with `experiments.supervise` on three
processes of one simulated device each: undisturbed, and through the same
failures (killed, a bit of the parameters flipped, a loop that hangs, each time
growing back) with and without snapshots in memory. Writes .json and .png, and
fails if a loss differs by more than 1e-4 of itself, or if a snapshot of every
step saves less than all steps but one.
"""

import json
import pathlib
import shutil
import subprocess
import sys

from absl import app
from absl import flags
from matplotlib import figure

from experiments import report
from experiments.benchmarks import faults as faults_lib
from jaxtrain import goodput
from jaxtrain import metrics

_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/elastic_restart', 'Folder of the runs; whole ones are kept.'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  'experiments/benchmarks/results/elastic_restart',
  'Path without ending: .json and .png.',
)
_STEPS = flags.DEFINE_integer('steps', 100, 'Of each run.')

# (slot, after step, kind): each slot once, for one that fails again is left out
# for twice as long.
_FAULTS = ((1, 17, 'kill'), (2, 45, 'flip'), (0, 73, 'hang'))
_TOLERANCE = 1e-4  # Of a loss.
_ARMS = {
  'undisturbed': ((), ()),
  'failures, checkpoints': (_FAULTS, ()),
  'failures, snapshots': (_FAULTS, ('--snapshot_every=1',)),
}


def _run(folder, faults, arguments):
  """Supervises one run to its end, unless that has been done before."""
  if not _is_finished(folder):
    shutil.rmtree(folder, ignore_errors=True)
    _supervise(folder, faults, arguments)
  events = _events(folder)
  record = goodput.read(folder)
  failures = _failures(folder, events, faults)
  return dict(
    losses={r['step']: r['loss'] for r in metrics.read(folder)},
    failures=failures,
    events=[{k: v for k, v in e.items() if k != 'pids'} for e in events],
    seconds=record.seconds,
    fractions=record.fractions,
    # By heartbeats; the account of time forgets up to a second before a kill.
    lost_steps=sum(f['lost_steps'] for f in failures),
    record=record,
  )


def _events(folder):
  path = folder / 'supervise.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def _is_finished(folder):
  last = _events(folder)[-1:]
  return bool(last) and (last[0]['event'], last[0].get('code')) == ('finish', 0)


def _supervise(folder, faults, arguments):
  faults_lib.write(folder, faults)
  subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.supervise'),
      *('--config=byte_stdlib_tiny', f'--workdir={folder}'),
      '--trainer=experiments.benchmarks.faulty_trainer',
      *('--num_processes=3', '--devices_per_process=1', '--mesh=data=3'),
      *('--regrow_after_s=4', '--hang_floor_s=15', '--alive_s=15'),
      *('--override=batch_size=12', '--override=log_every=1'),
      *('--override=eval_batches=0', '--override=save_every=10'),
      f'--steps={_STEPS.value}',
      *arguments,
    ],
    check=True,
  )


def _failures(folder, events, faults):
  """For each fault: when it was noticed, and what it cost."""
  kills = [
    i
    for i, e in enumerate(events)
    if e['event'] == 'kill' and e['why'] != 'finished'
  ]
  if len(kills) != len(faults):
    raise RuntimeError(f'{len(faults)} faults, but {len(kills)} failures')
  rows = []
  for i, (kill, (slot, step, kind)) in enumerate(
    zip(kills, faults, strict=True)
  ):
    happened = faults_lib.happened_at(folder, i)
    recovered = next(e for e in events[kill:] if e['event'] == 'recovered')
    started = next(e for e in events[kill:] if e['event'] == 'start')
    rows.append(
      dict(
        kind=kind,
        after_step=step,
        slot=slot,
        expelled=events[kill]['lost'],
        noticed_s=events[kill]['time'] - happened,
        recovery_s=recovered['seconds'],
        lost_steps=recovered['lost_steps'],
        mesh=started['mesh'],
      )
    )
  return rows


def _difference(losses, reference):
  return {s: abs(v / reference[s] - 1) for s, v in losses.items()}


def _check(results):
  """Names of what is not as it should be."""
  wrong = []
  reference = results['undisturbed']['losses']
  for name, result in results.items():
    if set(result['losses']) != set(range(1, _STEPS.value + 1)):
      wrong.append(f'{name}: steps are missing')
    worst = max(_difference(result['losses'], reference).values())
    result['max_relative_difference'] = worst
    if worst > _TOLERANCE:
      wrong.append(f'{name}: losses differ by {worst:.1e}')
    for failure in result['failures']:
      if failure['expelled'] != [failure['slot']]:
        wrong.append(f'{name}: {failure} has expelled another')
  for failure in results['failures, snapshots']['failures']:
    # After garbage the snapshots are thrown away, too.
    if failure['kind'] != 'flip' and failure['lost_steps'] > 1:
      wrong.append(f'snapshots: {failure} has lost more than one step')
  return wrong


def _draw(results, path):
  fig = figure.Figure(figsize=(9, 10), layout='constrained')
  top, middle, *bars = fig.subplots(
    2 + len(results) - 1, 1, gridspec_kw=dict(height_ratios=[3, 1.5, 2, 2])
  )
  reference = results['undisturbed']['losses']
  looks = (('C0', '-'), ('C1', '--'), ('C2', ':'))
  for (name, result), (color, style) in zip(
    results.items(), looks, strict=True
  ):
    line = dict(color=color, linestyle=style, label=name)
    losses = result['losses']
    top.plot(list(losses), list(losses.values()), **line)
    if name != 'undisturbed':
      apart = _difference(losses, reference)
      middle.semilogy(
        list(apart), [max(v, 1e-9) for v in apart.values()], **line
      )
  for _, step, kind in _FAULTS:
    top.axvline(step, color='grey', linewidth=0.6)
    top.annotate(kind, (step, max(reference.values())), rotation=90, va='top')
  top.set(xlabel='step', ylabel='loss, nats per byte')
  middle.axhline(_TOLERANCE, color='grey', linewidth=0.6)
  middle.set(xlabel='step', ylabel='relative difference')
  for ax, (name, result) in zip(bars, list(results.items())[1:], strict=True):
    report.draw_goodput(ax, result['record'])
    part = 100 * result['fractions']['step']
    ax.set(
      title=f'{name}: {part:.0f} % are steps, {result["lost_steps"]} lost',
      xlabel='seconds since the run began',
      ylabel='incarnation',
    )
  top.legend()
  middle.legend()
  bars[-1].legend(ncols=5, loc='upper right', fontsize='small')
  fig.savefig(path, dpi=100)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  workdir = pathlib.Path(_WORKDIR.value)
  results = {
    name: _run(workdir / name.replace(', ', '_'), *arm)
    for name, arm in _ARMS.items()
  }
  wrong = _check(results)
  output = pathlib.Path(_OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  _draw(results, output.with_suffix('.png'))
  kept = {
    name: {k: v for k, v in result.items() if k != 'record'}
    for name, result in results.items()
  }
  text = json.dumps(dict(steps=_STEPS.value, **kept), indent=1)
  output.with_suffix('.json').write_text(text + '\n')
  for name, result in results.items():
    rows = [(f'{c}, s', s) for c, s in result['seconds'].items() if s]
    rows += [
      (
        f'{f["kind"]}: noticed, recovered, lost',
        f'{f["noticed_s"]:.1f} s, {f["recovery_s"]:.1f} s, {f["lost_steps"]}',
      )
      for f in result['failures']
    ]
    rows.append(('largest difference', result['max_relative_difference']))
    print(f'\n{name}\n{report.text_table(rows)}')
  if wrong:
    sys.exit('elastic_restart: ' + '; '.join(wrong))


if __name__ == '__main__':
  app.run(main)
