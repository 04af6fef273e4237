"""The tree of a prefix cache: a node is a page, a path is a prefix.

Zheng et al., "SGLang: Efficient Execution of Structured Language Model
Programs", https://arxiv.org/abs/2312.07104, section 3. Deviation: edges are
pages and are not joined into longer ones. A node then never splits, whoever
holds part of it, and every quantity that eviction needs is a counter.
"""

import bisect
from typing import Any

from jaxserve.cache import keys as keys_lib
from jaxserve.cache.keys import Keys


class Node:
  """One cached page, reached by the tokens of all pages before it.

  Long prompts make thousands of these, most with one child: it has a field of
  its own, and a dictionary is made for the second one.

  Attributes:
    key: Its tokens, as bytes; those of a leaf may be fewer than a page.
    parent: The page before it.
    depth: Pages from the root, itself included.
    page: Its number on the device; -1 if it is not there.
    host: Its copy in host memory, if there is one.
    pins: 1 if a request holds the page, plus the children that are pinned.
    fanout: Children that are on the device.
    is_queued: Whether it stands in the queue of pages to evict.
    last_use: See `scores.Page`, as for the next two.
    num_uses: Requests that found it, and the one that computed it.
    floor: Score of the page evicted last, at the time of the last use.
    child: The only page behind it, while `children` is `None`.
    children: Key -> page behind it. No key is the start of another one.
  """

  __slots__ = (
    'child',
    'children',
    'depth',
    'fanout',
    'floor',
    'host',
    'is_queued',
    'key',
    'last_use',
    'num_uses',
    'page',
    'parent',
    'pins',
  )

  def __init__(
    self,
    key: bytes,
    parent: 'Node | None',
    depth: int,
    page: int = -1,
    pins: int = 0,
    fanout: int = 0,
  ):
    self.key = key
    self.parent = parent
    self.depth = depth
    self.page = page
    self.host: Any = None
    self.pins = pins
    self.fanout = fanout
    self.is_queued = False
    self.last_use = 0
    self.num_uses = 1
    self.floor = 0.0
    self.child: Node | None = None
    self.children: dict[bytes, Node] | None = None

  @property
  def is_alive(self) -> bool:
    """Whether it is in the tree: on the device, on the host, or the root."""
    return self.page >= 0 or self.host is not None or self.parent is None

  @property
  def has_children(self) -> bool:
    return self.child is not None or bool(self.children)

  def values(self) -> list['Node']:
    """The children."""
    if self.children is not None:
      return list(self.children.values())
    return [] if self.child is None else [self.child]


class RadixTree:
  """Nodes by prefix; empty nodes are the caller's to detach.

  Attributes:
    root: The empty prefix. Always pinned, so that no walk passes it.
  """

  def __init__(self):
    self.root = Node(b'', None, 0, pins=1)
    # Sorted keys of the children of nodes where a neighbour was asked for.
    self._sorted: dict[Node, list[bytes]] = {}

  def find(self, keys: Keys, num_pages: int) -> Node:
    """The deepest node on the path of the first `num_pages` whole pages."""
    node = self.root
    if keys.bookmark is not None and keys.bookmark[0] is self.root:
      node = keys.bookmark[1]
      while not node.is_alive or node.depth > num_pages:
        node = node.parent
    for key in keys.pages[node.depth : num_pages]:
      child = node.child
      if child is None or child.key != key:
        if node.children is None or key not in node.children:
          break
        child = node.children[key]
      node = child
    return node

  def is_current(self, keys: Keys) -> bool:
    """Whether no other tree has left its bookmark."""
    return keys.bookmark is None or keys.bookmark[0] is self.root

  def mark(self, keys: Keys, node: Node) -> None:
    """Lets the next `find` start at `node`."""
    keys.bookmark = (self.root, node)

  def closest(self, node: Node, key: bytes) -> tuple[Node | None, int]:
    """The child with most tokens in common with `key`, and how many.

    In sorted order that is a neighbour of `key`.
    """
    before, after = self._neighbours(node, key)
    best, most = None, 0
    for child in (after, before):
      if child is None:
        continue
      count = keys_lib.num_common(child.key, key)
      is_here = best is None or (child.page >= 0 > best.page)
      if count > most or (count and count == most and is_here):
        best, most = child, count
    return best, most

  def shorter(self, node: Node, key: bytes) -> Node | None:
    """The child whose tokens are the start of `key`, but not all of it."""
    before, _ = self._neighbours(node, key)
    return before if before and key.startswith(before.key) else None

  def longer(self, node: Node, key: bytes) -> Node | None:
    """A child whose tokens start with `key`."""
    _, after = self._neighbours(node, key)
    return after if after and after.key.startswith(key) else None

  def attach(self, parent: Node, key: bytes) -> Node:
    """Adds a child; no other one may start with `key`, or be its start."""
    node = Node(key, parent, parent.depth + 1)
    if not parent.has_children:
      parent.child = node
      parent.children = None
      return node
    if parent.children is None:
      parent.children = {parent.child.key: parent.child}
      parent.child = None
    parent.children[key] = node
    if parent in self._sorted:
      bisect.insort(self._sorted[parent], key)
    return node

  def detach(self, node: Node) -> None:
    """Takes a node, and so all behind it, out of the tree."""
    parent = node.parent
    if parent.children is None:
      parent.child = None
      return
    del parent.children[node.key]
    if not parent.children:
      self._sorted.pop(parent, None)
    elif (keys := self._sorted.get(parent)) is not None:
      del keys[bisect.bisect_left(keys, node.key)]

  def _neighbours(self, node, key):
    """The children just before `key`, and at or just after it, in order."""
    if not node.children:
      child = node.child
      is_before = child is not None and child.key < key
      return (child, None) if is_before else (None, child)
    if node not in self._sorted:
      self._sorted[node] = sorted(node.children)
    keys = self._sorted[node]
    i = bisect.bisect_left(keys, key)
    before = node.children[keys[i - 1]] if i else None
    after = node.children[keys[i]] if i < len(keys) else None
    return before, after
