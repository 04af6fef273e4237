"""The tree against sorted lists and dictionaries."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.keys import Keys
from jaxserve.cache.radix_tree import RadixTree

_page = st.tuples(*[st.integers(0, 2)] * 3)


def _key(tokens):
  keys = Keys(tokens, 3)
  return keys.pages[0] if keys.pages else keys.rest


def _common(a, b):
  equal = [x == y for x, y in zip(a, b, strict=False)]
  return (equal + [False]).index(False)


@given(st.lists(st.tuples(st.booleans(), _page), max_size=40), _page)
def test_finds_the_closest_child(moves, query):
  tree, children = RadixTree(), {}
  for i, (is_new, page) in enumerate(moves):
    if is_new and page not in children:
      children[page] = tree.attach(tree.root, _key(page))
      children[page].page = i
    elif not is_new and page in children:
      tree.detach(children.pop(page))
    assert tree.root.has_children == bool(children)
    assert set(tree.root.values()) == set(children.values())
    for length in (1, 2, 3):
      start = query[:length]
      best, count = tree.closest(tree.root, _key(start))
      expected = max((_common(p, start) for p in children), default=0)
      assert count == expected
      assert (best is not None) == (expected > 0)
      if best is not None:
        (tokens,) = [p for p, node in children.items() if node is best]
        assert _common(tokens, start) == expected
      longer = tree.longer(tree.root, _key(start))
      assert (longer is not None) == any(p[:length] == start for p in children)


def test_children_come_again_after_the_last_has_gone():
  tree = RadixTree()
  pages = [(0, 0, 0), (0, 2, 0)]
  for _ in range(2):
    nodes = [tree.attach(tree.root, _key(page)) for page in pages]
    assert tree.closest(tree.root, _key((0, 1))) == (nodes[1], 1)
    assert tree.closest(tree.root, _key((0, 0))) == (nodes[0], 2)
    for node in nodes:
      tree.detach(node)
    assert tree.closest(tree.root, _key((0, 0))) == (None, 0)


def test_prefers_a_child_on_the_device():
  tree = RadixTree()
  nodes = [tree.attach(tree.root, _key((1, 1, x))) for x in (0, 2)]
  for here in nodes:
    for node in nodes:
      node.page = 5 if node is here else -1
      node.host = 'copy'
    assert tree.closest(tree.root, _key((1, 1, 1))) == (here, 2)


def test_a_shorter_child_is_the_start_of_the_key():
  tree = RadixTree()
  short = tree.attach(tree.root, _key((1, 2)))
  other = tree.attach(tree.root, _key((1, 1, 1)))
  assert tree.shorter(tree.root, _key((1, 2, 0))) is short
  assert tree.shorter(tree.root, _key((1, 1))) is None
  assert tree.longer(tree.root, _key((1, 1))) is other
  tree.detach(other)
  assert tree.shorter(tree.root, _key((1, 2, 0))) is short


def test_a_bookmark_outlives_what_it_marks():
  tree, keys = RadixTree(), Keys([1, 1, 1, 2, 2, 2, 3, 3, 3], 3)
  path = [tree.root]
  for i, key in enumerate(keys.pages):
    path.append(tree.attach(path[-1], key))
    path[-1].page = i
  tree.mark(keys, path[3])
  assert tree.find(keys, 3) is path[3]
  assert tree.find(keys, 1) is path[1]
  for node in (path[3], path[2]):
    tree.detach(node)
    node.page = -1
  assert tree.find(keys, 3) is path[1]
  again = tree.attach(path[1], keys.pages[1])
  again.page = 7
  assert tree.find(keys, 3) is again
  other = RadixTree()
  assert tree.is_current(keys) and not other.is_current(keys)
  assert other.find(keys, 3) is other.root
