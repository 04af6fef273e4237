"""BatchLLM: prompts that share a prefix run together, decode-heavy ones first.

Zheng et al., "BatchLLM: Optimizing Large Batched LLM Inference with Global
Prefix Sharing and Throughput-oriented Token Batching",
https://arxiv.org/abs/2412.03594, section 4: explicit global prefix
identification, groups scheduled as a whole, reordering by the ratio of decode
to prefill tokens, memory-centric token batching.

For offline work, all of it known: requests that keep arriving may starve those
of a low ratio.

Deviations. The paper merges the prefix tree to one level bottom-up, forking a
child where that saves more; the same objective (tokens saved, each request
sharing one prefix) is solved exactly here, in `group`. Prefixes count in whole
pages, as these are what is shared. A step's tokens and rows are bounded by what
the engine was compiled for; within that, only free pages limit a batch.
"""

from collections.abc import Callable, Sequence
import dataclasses

from jaxserve.schedulers import base


@dataclasses.dataclass(frozen=True)
class Group:
  """Prompts that share their first tokens.

  Attributes:
    members: Indices of the prompts, in lexicographic order.
    prefix_len: Tokens they share; 0 in a group of one.
  """

  members: tuple[int, ...]
  prefix_len: int

  @property
  def num_saved(self) -> int:
    """Tokens that need not be computed again."""
    return (len(self.members) - 1) * self.prefix_len


def prefix_grouped(
  decode_len: Callable[[base.Request], float] = lambda r: r.max_tokens,
) -> base.Scheduler:
  """Runs groups one after the other; in each, the first computes the prefix.

  The others of a group wait until its prefix is cached, or has been computed
  by one that runs (where nothing is cached, they compute it themselves).

  Args:
    decode_len: Tokens a request is expected to generate.
  """
  known: set[int] = set()
  place: dict[int, tuple[int, int, int]] = {}

  def regroup(requests, page_size):
    requests = sorted(requests, key=lambda r: r.arrival)
    groups = group([r.prompt for r in requests], page_size)

    def key(g):
      members = [requests[i] for i in g.members]
      prefill = sum(len(r.prompt) for r in members) - g.num_saved
      ratio = sum(map(decode_len, members)) / max(prefill, 1)
      return -ratio, min(r.arrival for r in members)

    place.clear()
    for number, g in enumerate(sorted(groups, key=key)):
      for r in (requests[i] for i in g.members):
        place[r.id] = number, g.prefix_len, r.arrival

  def schedule(requests, budget):
    ids = {r.id for r in requests}
    if not ids <= known:
      known.clear()
      known.update(ids)
      regroup(requests, budget.page_size)
    running = [r for r in requests if r.is_running]
    running.sort(key=lambda r: (not r.is_decoding, place[r.id]))
    waiting = [r for r in requests if not r.is_running]
    waiting.sort(key=lambda r: place[r.id])
    ready = _ready(running, waiting, place, budget)
    return base.admit(running + ready, budget, budget.max_tokens)

  return schedule


def _ready(running, waiting, place, budget):
  """Those of `waiting` that need not wait for another's prefix."""
  led, computed = set(), set()
  for r in running:
    number, prefix_len, _ = place[r.id]
    (led if r.num_computed < prefix_len else computed).add(number)
  ready = []
  for r in waiting[: 2 * budget.max_requests]:
    number, prefix_len, _ = place[r.id]
    if number in led and budget.num_cached(r) < prefix_len:
      continue
    ready.append(r)
    if number not in computed:
      led.add(number)
  return ready


def group(prompts: Sequence[Sequence[int]], page_size: int) -> list[Group]:
  """Groups that save the most tokens if each prompt shares one prefix.

  Over the compact prefix tree, `best[v][i]` is what the prompts under node `v`
  save if the nearest chosen node above `v` is its i-th ancestor: either `v` is
  not chosen, or it is, and its tokens are computed once.
  """
  if not prompts:
    return []
  order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
  tree = _tree([tuple(prompts[i]) for i in order], page_size)
  best: dict[int, list[int]] = {}
  chosen: dict[int, list[bool]] = {}
  for v, node in reversed(list(enumerate(tree))):
    depths = [tree[a].depth for a in node.ancestors]
    if node.leaf is not None:
      best[v] = depths
      continue
    rows = [best[c] for c in node.children]
    below = [sum(column) for column in zip(*rows, strict=True)]
    own = below.pop() - node.depth
    chosen[v] = [own > without for without in below]
    best[v] = [max(own, without) for without in below]
  members: dict[int, list[int]] = {}
  prefix: dict[int, int] = {0: 0}  # Node -> index of its chosen ancestor.
  for v, node in enumerate(tree):
    if v:
      parent = node.ancestors[-1]
      i = prefix[parent]
      prefix[v] = i
      if node.leaf is not None:
        owner = node.ancestors[i]
        members.setdefault(owner, []).append(order[node.leaf])
      elif chosen[v][i]:
        prefix[v] = len(node.ancestors)
  groups = []
  for owner, indices in members.items():
    if depth := tree[owner].depth:
      groups.append(Group(tuple(indices), depth))
    else:
      groups += [Group((i,), 0) for i in indices]
  return groups


@dataclasses.dataclass
class _Node:
  depth: int
  ancestors: list[int]
  leaf: int | None = None
  children: list[int] = dataclasses.field(default_factory=list)


def _tree(ordered, page_size):
  """Compact prefix tree of sorted prompts; parents before their children."""
  shared = [
    _common(a, b) // page_size * page_size
    for a, b in zip(ordered, ordered[1:], strict=False)
  ]
  tree = [_Node(0, [])]
  # Ranges of prompts under a node that exists already.
  pending = [(0, 0, len(ordered))]
  while pending:
    v, lo, hi = pending.pop()
    ancestors = [*tree[v].ancestors, v]
    start = lo
    for end in range(lo + 1, hi + 1):
      if end < hi and shared[end - 1] > tree[v].depth:
        continue
      if end - start == 1:
        child = _Node(tree[v].depth, ancestors, leaf=start)
      else:
        child = _Node(min(shared[start : end - 1]), ancestors)
        pending.append((len(tree), start, end))
      tree[v].children.append(len(tree))
      tree.append(child)
      start = end
  return tree


def _common(a, b):
  """Tokens that both start with; the last of either is never shared."""
  lo, hi = 0, min(len(a), len(b)) - 1
  while lo < hi:
    middle = (lo + hi + 1) // 2
    if a[:middle] == b[:middle]:
      lo = middle
    else:
      hi = middle - 1
  return max(lo, 0)
