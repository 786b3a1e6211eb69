//! Small files of one value, and folders of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What a file says, without the line's end; nothing where it cannot be read or is empty. The kernel refuses to say what
/// it does not know: the type of an empty GID, the speed of a link that is down.
pub fn text(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// The number that a file holds.
pub fn number<T: FromStr>(path: &Path) -> Option<T> {
    text(path)?.parse().ok()
}

/// The hexadecimal number that a file holds, `0x10de`.
pub fn hexadecimal(path: &Path) -> Option<u32> {
    let text = text(path)?;
    u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

/// The names in a folder, those with numbers in the order of the numbers; none where there is no such folder.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_by_cached_key(|name| {
        let stem = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
        let number: u64 = name[stem.len()..].parse().unwrap_or(0);
        (stem.to_owned(), number, name.clone())
    });
    names
}

/// The last name on the path that a link leads to: the driver of a device, for instance.
pub fn target_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

/// A file in the tree of a root folder, from its path on a machine.
pub fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}
