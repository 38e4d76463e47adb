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

/// Bytes of key and value that a leaf has at the least; shorter values are padded.
///
/// A frame has 479,232 bytes for nodes and 10,240 slots. Where the slots are used up first, holt 0.9.2 cannot split the
/// frame, for that takes one more slot ("blob slot table exhausted"), and nothing can be put there ever again. A leaf
/// takes 16 bytes more than its key and value, and comes with one inner node of at least 16 bytes: with leaves of 80
/// bytes a frame has no room for more than 9,984 nodes.
const LEAF_BYTES: usize = 64;

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

    /// The values of keys, in their order.
    fn get_many<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<PyBackedBytes>,
    ) -> PyResult<Vec<Option<Bound<'py, PyBytes>>>> {
        let values = detached(py, || {
            self.0.with(|tree| {
                keys.iter()
                    .map(|key| tree.get(key))
                    .collect::<holt::Result<Vec<_>>>()
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

    /// Put each key, or delete it where its value is None: all of them or none, in one record of the log.
    fn atomic(
        &self,
        py: Python<'_>,
        changes: Vec<(PyBackedBytes, Option<PyBackedBytes>)>,
    ) -> PyResult<()> {
        detached(py, || {
            self.0.with(|tree| {
                tree.atomic(|batch| {
                    for (key, value) in &changes {
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
                tree.compact()?;
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
