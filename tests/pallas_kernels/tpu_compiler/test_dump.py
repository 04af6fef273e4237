"""Which files of a dump belong to which kernel."""

from pallas_kernels.tpu_compiler import dump

_SLOTS = 'pre-delay_hlo-static-per-bundle-utilization.txt'
_FILES = (
  '11-TLP-01-packed-bundles-post-ra.txt',
  '12-<late-initialization>-01-packed-bundles-post-ra.txt',
  '13-fusion.2-01-packed-bundles-post-ra.txt',
  '13-fusion.2-03-post-delay-converter.txt',
  f'13-fusion.2-02-{_SLOTS}',
  '13-fusion.2-05-final_bundles.txt',
  '13-fusion.2-01-packed-bundles-post-ra-schedule-analysis.txt',
  '14-my-kernel-01-packed-bundles-post-ra.txt',
  '15-my-kernel-01-packed-bundles-post-ra.txt',
  '15-my-kernel-03-post-delay-converter.txt',
  'notes.html',
)
_TABLE = "  #allocation0 [shape = 'u32[]', space=smem, size = 0x4]\n"


def test_kernels_and_pruning(tmp_path):
  for name in _FILES:
    (tmp_path / name).write_text(f'x\n{_TABLE}y space=smem\n')
  (tmp_path / 'more').mkdir()
  (tmp_path / 'more' / 'file').touch()
  dump.prune(tmp_path)
  left = {p.name for p in tmp_path.iterdir()}
  assert set(_FILES) - left == {
    '13-fusion.2-01-packed-bundles-post-ra-schedule-analysis.txt',
    '13-fusion.2-05-final_bundles.txt',
    'notes.html',
  }
  assert left <= set(_FILES)
  found = dump.kernel_files(tmp_path)
  assert list(found) == ['fusion.2', 'my-kernel']
  fusion, kernel = found.values()
  assert fusion.allocations.read_text() == _TABLE
  assert fusion.slots.name == f'13-fusion.2-02-{_SLOTS}'
  # Compiled twice: the later one counts.
  assert kernel.listing.name.startswith('15-')
  assert kernel.allocations.name.startswith('15-')
  assert kernel.slots is None


def test_flags_name_the_folder_and_the_passes(tmp_path):
  flags = dump.flags(tmp_path)
  assert f'--xla_jf_dump_to={tmp_path}' in flags
  assert any('packed-bundles-post-ra' in flag for flag in flags)
