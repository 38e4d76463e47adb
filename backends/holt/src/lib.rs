//! The binding of the `holt` crate that `kvcensus_holt` needs, and nothing of what it means.
//!
//! Every call gives the interpreter free while it works. `close` waits for the calls that are under way.
//! Errors are `NativeError(kind, text)`; the kinds are those of `kind_of`.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::RwLock;
use std::time::Duration;

use holt::{CheckpointConfig, Durability, Error, KeyRangeEntryRef, RangeEntry, TreeBuilder};
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

create_exception!(_native, NativeError, PyException);

/// Bytes of key and value that a leaf has at the least; shorter values are padded. The leaf takes 112 bytes then: 16 of
/// its own, the zero byte after the key, and the one that `padded` adds.
///
/// What holt 0.9.2 does with a full frame must not fail, for then nothing can be put there ever again:
///
/// - It packs the frame. An inner node of 16 bytes that is left with one child becomes one of 128 bytes; so a deleted
///   leaf must have 112, or a packed frame may need more room than the full one ("blob data area exhausted").
/// - It divides the frame, which takes one more of 10,240 slots ("blob slot table exhausted"). For nodes there are
///   479,232 bytes, and with each leaf comes at most one inner node of at least 16: bytes run out before slots do.
const LEAF_BYTES: usize = 94;

/// A value as it is stored: the number of bytes that pad it, those bytes, and the value.
fn padded(key: &[u8], value: &[u8]) -> Vec<u8> {
    let pad = LEAF_BYTES.saturating_sub(key.len() + value.len());
    let mut stored = vec![0; 1 + pad];
    stored[0] = pad as u8;
    stored.extend_from_slice(value);
    stored
}

/// The value in what is stored. Bytes that no `padded` made give an empty one, which no reader takes.
fn unpadded(stored: &[u8]) -> &[u8] {
    let pad = stored.first().map_or(0, |pad| *pad as usize);
    stored.get(1 + pad..).unwrap_or_default()
}

/// Keys that lie side by side and are applied one after the other, see `in_turn`.
const RUN: usize = 32;

/// The order in which a sorted batch is applied.
///
/// Sorted, so that a frame is read once: one that is not in memory takes more than a millisecond. Some of the first half
/// and some of the second in turn, which are mostly rows and links: for each insertion below the second frame of its
/// path, holt 0.9.2 looks at all that is left of a run of insertions of one length, and these differ in it.
fn in_turn<T>(sorted: &[T]) -> Vec<&T> {
    let mut order = Vec::with_capacity(sorted.len());
    let (first, second) = sorted.split_at(sorted.len() / 2);
    for at in (0..second.len()).step_by(RUN) {
        order.extend(first.iter().skip(at).take(RUN));
        order.extend(second.iter().skip(at).take(RUN));
    }
    order
}

/// Frames that one call of `compact` of holt 0.9.2 packs at the most.
const COMPACTED: u32 = 256;

type Failure = (&'static str, String);
type Pairs = Vec<(Vec<u8>, Vec<u8>)>;
type Rows<'py> = Vec<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)>;

/// Which of our errors one of the crate is.
fn kind_of(error: &Error) -> &'static str {
    match error {
        Error::BlobStoreIo(io) => match io.kind() {
            std::io::ErrorKind::WouldBlock => "busy",
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "full",
            std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof => "corrupt",
            _ => "io",
        },
        Error::NodeCorrupt { .. } | Error::ReplaySanityFailed { .. } => "corrupt",
        Error::KeyTooLong { .. } | Error::ValueTooLong { .. } | Error::WalRecordTooLarge { .. } => {
            "limit"
        }
        _ => "internal",
    }
}

fn failure(error: Error) -> Failure {
    (kind_of(&error), error.to_string())
}

fn raised((kind, text): Failure) -> PyErr {
    NativeError::new_err((kind, text))
}

/// Work without the interpreter. A panic of the crate, as damaged files can cause one, is an error like others.
fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Failure> + Send,
) -> PyResult<T> {
    py.detach(|| {
        catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|_| Err(("panic", "the crate panicked, see standard error".into())))
    })
    .map_err(raised)
}

/// What is open, or nothing once it was closed.
struct Slot<T>(RwLock<Option<T>>);

impl<T> Slot<T> {
    fn new(value: T) -> Self {
        Self(RwLock::new(Some(value)))
    }

    fn with<R>(&self, work: impl FnOnce(&T) -> holt::Result<R>) -> Result<R, Failure> {
        let held = self
            .0
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let value = held
            .as_ref()
            .ok_or(("closed", "it is closed".to_string()))?;
        work(value).map_err(failure)
    }

    fn empty(&self) {
        let value = self
            .0
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        drop(value);
    }
}

fn rows(py: Python<'_>, found: Pairs) -> Rows<'_> {
    found
        .into_iter()
        .map(|(key, value)| (PyBytes::new(py, &key), PyBytes::new(py, unpadded(&value))))
        .collect()
}

fn collected(
    range: impl IntoIterator<Item = holt::Result<RangeEntry>>,
    limit: usize,
) -> holt::Result<Pairs> {
    let mut found = Vec::new();
    for entry in range {
        if let RangeEntry::Key { key, value, .. } = entry? {
            found.push((key, value));
            if found.len() == limit {
                break;
            }
        }
    }
    Ok(found)
}

/// An open tree. One thread writes, any thread reads.
#[pyclass(frozen)]
struct Tree(Slot<holt::Tree>);

#[pymethods]
impl Tree {
    /// Open or create the tree in a directory. `sync`: a batch is on disk when it returns. Nothing is written to the
    /// data file but by `checkpoint`.
    #[new]
    fn open(py: Python<'_>, path: PathBuf, sync: bool, cache_frames: usize) -> PyResult<Self> {
        let manual = CheckpointConfig {
            enabled: false,
            idle_interval: Duration::from_secs(3600),
            ..CheckpointConfig::default()
        };
        detached(py, || {
            TreeBuilder::new(path)
                .durability(Durability::Wal { sync })
                .buffer_pool_size(cache_frames)
                .checkpoint(manual)
                .open()
                .map(|tree| Self(Slot::new(tree)))
                .map_err(failure)
        })
    }

    fn get<'py>(
        &self,
        py: Python<'py>,
        key: PyBackedBytes,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let value = detached(py, || self.0.with(|tree| tree.get(&key)))?;
        Ok(value.map(|value| PyBytes::new(py, unpadded(&value))))
    }

    /// The values of keys, in their order. They are looked up sorted, so that each frame is read once.
    fn get_many<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<PyBackedBytes>,
    ) -> PyResult<Vec<Option<Bound<'py, PyBytes>>>> {
        let values = detached(py, || {
            let mut order: Vec<usize> = (0..keys.len()).collect();
            order.sort_unstable_by(|one, other| keys[*one].as_ref().cmp(keys[*other].as_ref()));
            self.0.with(|tree| {
                let mut values = vec![None; keys.len()];
                for at in order {
                    values[at] = tree.get(&keys[at])?;
                }
                Ok(values)
            })
        })?;
        Ok(values
            .into_iter()
            .map(|value| value.map(|value| PyBytes::new(py, unpadded(&value))))
            .collect())
    }

    /// Every key under each prefix, and its value.
    fn scan_each<'py>(
        &self,
        py: Python<'py>,
        prefixes: Vec<PyBackedBytes>,
    ) -> PyResult<Vec<Rows<'py>>> {
        let found = detached(py, || {
            self.0.with(|tree| {
                prefixes
                    .iter()
                    .map(|prefix| collected(tree.scan(prefix), usize::MAX))
                    .collect::<holt::Result<Vec<_>>>()
            })
        })?;
        Ok(found.into_iter().map(|one| rows(py, one)).collect())
    }

    /// The first `limit` keys under a prefix after one of them (0: all), without their values.
    #[pyo3(signature = (prefix, after=None, limit=0))]
    fn scan_keys<'py>(
        &self,
        py: Python<'py>,
        prefix: PyBackedBytes,
        after: Option<PyBackedBytes>,
        limit: usize,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        let found = detached(py, || {
            self.0.with(|tree| {
                let mut range = tree.scan_keys(&prefix);
                if let Some(after) = &after {
                    range = range.start_after(after);
                }
                let mut found: Vec<Vec<u8>> = Vec::new();
                range.visit(limit, |entry| {
                    if let KeyRangeEntryRef::Key { key, .. } = entry {
                        found.push(key.to_vec());
                    }
                    Ok(())
                })?;
                Ok(found)
            })
        })?;
        Ok(found.iter().map(|key| PyBytes::new(py, key)).collect())
    }

    /// Put each key, or delete it where its value is None: all of them or none, in one record of the log. No key twice.
    fn atomic(
        &self,
        py: Python<'_>,
        mut changes: Vec<(PyBackedBytes, Option<PyBackedBytes>)>,
    ) -> PyResult<()> {
        detached(py, || {
            changes.sort_unstable_by(|(one, _), (other, _)| one.as_ref().cmp(other.as_ref()));
            self.0.with(|tree| {
                tree.atomic(|batch| {
                    for (key, value) in in_turn(&changes) {
                        match value {
                            Some(value) => batch.put(key, &padded(key, value)),
                            None => batch.delete(key),
                        }
                    }
                })
                .map(|_| ())
            })
        })
    }

    /// The tree as it is now, unmoved by later writes. It keeps the files open until it is closed itself.
    fn snapshot(&self, py: Python<'_>) -> PyResult<Snapshot> {
        detached(py, || self.0.with(|tree| tree.snapshot(b"")))
            .map(|snapshot| Snapshot(Slot::new(snapshot)))
    }

    /// Write all that changed to the data file, and empty the log.
    fn checkpoint(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.with(holt::Tree::checkpoint))
    }

    /// Pack every frame and give the disk what is free.
    fn compact(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.with(|tree| {
                for _ in 0..=tree.stats()?.blob_count / COMPACTED {
                    tree.compact()?;
                }
                tree.checkpoint()?;
                tree.gc()?;
                tree.vacuum().map(|_| ())
            })
        })
    }

    /// Close the files, once no call is under way. Nothing is written: see `checkpoint`.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.empty());
    }
}

/// A tree as of one moment.
#[pyclass(frozen)]
struct Snapshot(Slot<holt::Snapshot>);

#[pymethods]
impl Snapshot {
    /// The first `limit` keys and values under a prefix after one of them.
    #[pyo3(signature = (prefix, after=None, limit=0))]
    fn scan<'py>(
        &self,
        py: Python<'py>,
        prefix: PyBackedBytes,
        after: Option<PyBackedBytes>,
        limit: usize,
    ) -> PyResult<Rows<'py>> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        let found = detached(py, || {
            self.0.with(|snapshot| {
                let range = snapshot.scan(&prefix)?;
                let range = match &after {
                    Some(after) => range.start_after(after),
                    None => range,
                };
                collected(range, limit)
            })
        })?;
        Ok(rows(py, found))
    }

    /// Give the moment up.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.empty());
    }
}

#[pymodule(gil_used = true)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("NativeError", module.py().get_type::<NativeError>())?;
    module.add_class::<Tree>()?;
    module.add_class::<Snapshot>()
}
