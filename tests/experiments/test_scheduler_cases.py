"""The effects that papers claim, on small traces in the simulator."""

import pytest

from experiments.benchmarks import scheduler_cases
from experiments.benchmarks import scheduler_runs


@pytest.fixture(scope='module')
def figures():
  """Case -> scheduler -> its figures; each case is run once."""
  runs = {}

  def of(name, scale):
    if name not in runs:
      case = scheduler_cases.CASES[name](scale)
      runs[name] = {
        r['scheduler']: r for r in scheduler_runs.run_case(name, case)
      }
    return runs[name]

  return of


def test_chunks_keep_decodes_from_stalling(figures):
  of = figures('stalls', 0.5)
  for chunked in ('chunked, budget 512', 'split_fuse 512'):
    for figure in ('between_tokens_p99_s', 'between_tokens_max_s'):
      assert of['fcfs'][figure] > 5 * of[chunked][figure]
    assert of[chunked]['tokens_per_s'] > 0.95 * of['fcfs']['tokens_per_s']


def test_reuse_of_prefixes(figures):
  grouped = figures('documents', 0.25)['prefix_grouped']
  for other in ('fcfs', 'chunked_prefill'):
    of = figures('documents', 0.25)[other]
    assert grouped['prefilled_fraction'] < 0.5 * of['prefilled_fraction']
    assert grouped['tokens_per_s'] > 1.5 * of['tokens_per_s']


def test_the_difference_of_service_is_bounded(figures):
  of = figures('clients', 0.25)
  for fair in ('vtc', 'dlpm'):
    assert of['fcfs']['service_gap'] > 5 * of[fair]['service_gap']
    assert of[fair]['tokens_per_s'] > 0.95 * of['fcfs']['tokens_per_s']


def test_urgent_requests_do_not_wait(figures):
  of = figures('priorities', 0.5)
  for other in ('fcfs', 'chunked_prefill'):
    urgent = of['priority_aging']['first_token_p99_s']
    assert of[other]['first_token_p99_s'] > 5 * urgent
