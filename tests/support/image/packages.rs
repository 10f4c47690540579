//! Debian packages without installing them: fetched by apt with its own checks, unpacked, and searched for libraries.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::go_tools::Skip;
use crate::process::{run, run_within};

/// Longest download of some packages, of a few MB each.
const FETCH_TIMEOUT: Duration = Duration::from_secs(120);
/// Libraries of programs that we take nothing of, and large: if one is needed after all, the build says so.
const NOT_WANTED: &str = "libicu";
/// Where the first libraries are looked for.
const BASE: [&str; 2] = ["libc6", "libgcc-s1"];

/// Packages that were unpacked, each into a folder of its own.
pub struct Packages {
    /// Downloaded archives.
    cache: PathBuf,
    trees: PathBuf,
    known: BTreeMap<String, Package>,
    /// Those of which something is in the image.
    taken: BTreeSet<String>,
}

struct Package {
    archive: PathBuf,
    tree: PathBuf,
    version: String,
    /// Libraries it depends on, by package.
    libraries: Vec<String>,
}

/// One line of what apt would download.
struct Offer {
    file: String,
    sha256: String,
}

impl Packages {
    /// Archives are kept in `cache` and unpacked below `trees`.
    ///
    /// # Errors
    /// A folder cannot be made. A machine without Debian's tools is the inner one.
    pub fn new(cache: &Path, trees: &Path) -> Result<Result<Self, Skip>> {
        for tool in ["apt-get", "dpkg-deb", "readelf", "strip", "tar", "gzip"] {
            if Command::new(tool).arg("--version").output().is_err() {
                return Ok(Err(Skip(format!("there is no {tool} to make an image with"))));
            }
        }
        fs::create_dir_all(cache)?;
        Ok(Ok(Self {
            cache: fs::canonicalize(cache)?,
            trees: trees.to_owned(),
            known: BTreeMap::new(),
            taken: BTreeSet::new(),
        }))
    }

    /// Downloads and unpacks packages that are not there yet.
    ///
    /// # Errors
    /// An archive is not what apt's lists say, or cannot be unpacked. That it cannot be had is the inner one.
    pub fn fetch(&mut self, names: &[String]) -> Result<Result<(), Skip>> {
        let names: Vec<&String> = names.iter().filter(|name| !self.known.contains_key(*name)).collect();
        if names.is_empty() {
            return Ok(Ok(()));
        }
        let mut ask = Command::new("apt-get");
        ask.args(["download", "--print-uris"]).args(&names);
        let listed = match run(&mut ask) {
            Ok(listed) => listed,
            Err(error) => {
                return Ok(Err(Skip(format!("apt does not know {names:?} (apt-get update?): {error:#}"))));
            }
        };
        for offer in listed.lines().filter_map(Offer::parse) {
            let archive = self.cache.join(&offer.file);
            if !archive.exists()
                && let Err(error) = self.download(&offer)
            {
                return Ok(Err(Skip(format!("{} cannot be downloaded: {error:#}", offer.file))));
            }
            ensure!(sha256(&archive)? == offer.sha256, "{} is damaged: remove it", archive.display());
            self.unpack(archive)?;
        }
        for name in names {
            ensure!(self.known.contains_key(name), "apt offers no {name}");
        }
        Ok(Ok(()))
    }

    /// Beside the cache first, so that a download that was cut off is no archive.
    fn download(&self, offer: &Offer) -> Result<()> {
        let folder = tempfile::Builder::new().prefix("download-").tempdir_in(&self.cache)?;
        let mut words = offer.file.split('_');
        let (name, version) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let version = version.replace("%3a", ":");
        let mut download = Command::new("apt-get");
        // The unprivileged user of apt cannot write there.
        download.args(["-qq", "-o", "APT::Sandbox::User=root", "download", &format!("{name}={version}")]);
        run_within(FETCH_TIMEOUT, download.current_dir(folder.path()))?;
        fs::rename(folder.path().join(&offer.file), self.cache.join(&offer.file))?;
        Ok(())
    }

    fn unpack(&mut self, archive: PathBuf) -> Result<()> {
        let field = |name: &str| -> Result<String> {
            Ok(run(Command::new("dpkg-deb").arg("-f").arg(&archive).arg(name))?.trim().to_owned())
        };
        let name = field("Package")?;
        let tree = self.trees.join(&name);
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&tree))?;
        let depends = format!("{},{}", field("Pre-Depends")?, field("Depends")?);
        let package =
            Package { tree, version: field("Version")?, libraries: libraries_in(&depends), archive };
        self.known.insert(name, package);
        Ok(())
    }

    /// Copies a file of a package, or all files of a folder of it.
    ///
    /// # Errors
    /// The package has no such file.
    pub fn install(&mut self, package: &str, name: &str, root: &Path) -> Result<()> {
        let tree = &self.known.get(package).with_context(|| format!("{package} was not fetched"))?.tree;
        // Packages put into /sbin what the image has in /usr/sbin.
        let places = [tree.join(name), tree.join(name.strip_prefix("usr/").unwrap_or(name))];
        let from = places.iter().find(|path| path.symlink_metadata().is_ok());
        let from = from.with_context(|| format!("{package} has no {name}"))?;
        let to = root.join(name);
        if name.ends_with('/') {
            fs::create_dir_all(&to)?;
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                copy(&entry.path(), &to.join(entry.file_name()))?;
            }
        } else {
            copy(from, &to)?;
        }
        self.taken.insert(package.to_owned());
        Ok(())
    }

    /// Adds the libraries that the programs in the image need, and those that these need, with the loader.
    ///
    /// # Errors
    /// A library is in no package that a package taken depends on.
    pub fn install_libraries(&mut self, root: &Path) -> Result<Result<(), Skip>> {
        if let Err(skip) = self.fetch(&BASE.map(str::to_owned))? {
            return Ok(Err(skip));
        }
        let mut open: Vec<PathBuf> = Vec::new();
        for folder in ["usr/bin", "usr/sbin"] {
            for entry in fs::read_dir(root.join(folder))? {
                open.push(entry?.path());
            }
        }
        open.sort();
        let mut installed = BTreeSet::new();
        while let Some(program) = open.pop() {
            for name in needed(&program)? {
                if !installed.insert(name.clone()) {
                    continue;
                }
                let (package, from) = match self.find_or_fetch(&name)? {
                    Ok(found) => found,
                    Err(skip) => return Ok(Err(skip)),
                };
                let folder = from.parent().and_then(Path::file_name).context("a library without a folder")?;
                let to = root.join("usr/lib").join(folder).join(&name);
                copy(&fs::canonicalize(&from)?, &to)?;
                self.taken.insert(package);
                open.push(to);
            }
        }
        link_loader(root)?;
        Ok(Ok(()))
    }

    /// A library, in what there is, else in what that depends on.
    fn find_or_fetch(&mut self, name: &str) -> Result<Result<(String, PathBuf), Skip>> {
        loop {
            if let Some(found) = self.find(name) {
                return Ok(Ok(found));
            }
            let all = self.known.values().flat_map(|package| package.libraries.iter());
            let next: BTreeSet<String> =
                all.filter(|name| !self.known.contains_key(*name)).cloned().collect();
            if next.is_empty() {
                bail!("{name} is in no package: {:?}", self.known.keys());
            }
            if let Err(skip) = self.fetch(&next.into_iter().collect::<Vec<_>>())? {
                return Ok(Err(skip));
            }
        }
    }

    fn find(&self, library: &str) -> Option<(String, PathBuf)> {
        for (name, package) in &self.known {
            for folder in ["lib", "usr/lib"] {
                let Ok(entries) = fs::read_dir(package.tree.join(folder)) else { continue };
                let mut places = entries.flatten().map(|entry| entry.path().join(library));
                if let Some(found) = places.find(|path| path.exists()) {
                    return Some((name.clone(), found));
                }
            }
        }
        None
    }

    /// Adds each package's notice and what dpkg would know of it; answers `NAME=VERSION` of all.
    ///
    /// # Errors
    /// A package has no notice.
    pub fn install_notices(&mut self, root: &Path) -> Result<Vec<String>> {
        let mut versions = Vec::new();
        for name in self.taken.clone() {
            let folder = format!("usr/share/doc/{name}");
            let documents = self.tree_of(&name)?.join(&folder);
            if let Ok(other) = fs::read_link(&documents) {
                // Its notice is another package's, on which it depends.
                let other = other.to_string_lossy().into_owned();
                if let Err(skip) = self.fetch(std::slice::from_ref(&other))? {
                    bail!("{skip}");
                }
                copy(&documents, &root.join(&folder))?;
                self.install(&other, &format!("usr/share/doc/{other}/copyright"), root)?;
            } else {
                self.install(&name, &format!("{folder}/copyright"), root)?;
            }
        }
        let status = root.join("var/lib/dpkg/status.d");
        fs::create_dir_all(&status)?;
        for name in &self.taken {
            let package = self.known.get(name).with_context(|| name.clone())?;
            fs::write(status.join(name), run(Command::new("dpkg-deb").arg("-f").arg(&package.archive))?)?;
            versions.push(format!("{name}={}", package.version));
        }
        Ok(versions)
    }

    fn tree_of(&self, name: &str) -> Result<PathBuf> {
        Ok(self.known.get(name).with_context(|| format!("{name} was not fetched"))?.tree.clone())
    }
}

impl Offer {
    /// Of `'URL' FILE SIZE SHA256:DIGEST`.
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, file, _, digest] = words.as_slice() else { return None };
        let sha256 = digest.strip_prefix("SHA256:")?;
        (!file.contains('/')).then(|| Self { file: (*file).to_owned(), sha256: sha256.to_owned() })
    }
}

/// The packages of libraries among dependencies; of alternatives the first.
fn libraries_in(depends: &str) -> Vec<String> {
    let first = |entry: &str| {
        let name = entry.split(['|', '(', ':']).next().unwrap_or_default().trim();
        (name.starts_with("lib") && !name.starts_with(NOT_WANTED)).then(|| name.to_owned())
    };
    depends.split(',').filter_map(first).collect()
}

/// Names of the libraries that a program or library is linked against.
fn needed(program: &Path) -> Result<Vec<String>> {
    let listed = run(Command::new("readelf").arg("-d").arg(program).env("LC_ALL", "C"))?;
    let lines = listed.lines().filter(|line| line.contains("(NEEDED)"));
    Ok(lines.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned())).collect())
}

/// Puts the loader where programs name it.
fn link_loader(root: &Path) -> Result<()> {
    let program = root.join("usr/sbin/mke2fs");
    let listed = run(Command::new("readelf").arg("-l").arg(program).env("LC_ALL", "C"))?;
    let named = listed.split_once("program interpreter: ").and_then(|(_, rest)| rest.split_once(']'));
    let named = Path::new(named.context("a program without a loader")?.0);
    let name = named.file_name().context("a loader without a name")?;
    for entry in fs::read_dir(root.join("usr/lib"))? {
        let loader = entry?.path().join(name);
        if loader.is_file() {
            let link = root.join("usr").join(named.strip_prefix("/").unwrap_or(named));
            let target = Path::new("/").join(loader.strip_prefix(root)?);
            return symlink(target, &link).with_context(|| format!("cannot make {}", link.display()));
        }
    }
    bail!("there is no {}", named.display())
}

/// Copies a file, or a link as it is.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    match fs::read_link(from) {
        Ok(target) => symlink(target, to),
        Err(_) => fs::copy(from, to).map(drop),
    }
    .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Digest of a file, in hexadecimal.
pub fn sha256(file: &Path) -> Result<String> {
    let said = run(Command::new("sha256sum").arg(file))?;
    Ok(said.split_whitespace().next().context("sha256sum said nothing")?.trim_start_matches('\\').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_followed_and_programs_and_large_ones_are_not() {
        let depends = "libblkid1 (>= 2.17.2), libc6:amd64, libicu72 (>= 1), python3:any,liba | libb,,logsave";
        assert_eq!(libraries_in(depends), ["libblkid1", "libc6", "liba"]);
    }

    #[test]
    fn an_offer_is_a_file_with_its_digest() {
        let line = "'http://mirror/pool/a_1%2b2_amd64.deb' a_1+2_amd64.deb 571920 SHA256:fedd";
        let offer = Offer::parse(line).unwrap();
        assert_eq!((offer.file.as_str(), offer.sha256.as_str()), ("a_1+2_amd64.deb", "fedd"));
        for bad in ["", "Get:1 x", "'u' ../a.deb 1 SHA256:ab", "'u' a.deb 1 MD5Sum:ab"] {
            assert!(Offer::parse(bad).is_none(), "{bad}");
        }
    }
}
