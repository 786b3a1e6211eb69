//! How `ibv_get_device_list`, which is given nothing, finds the fabric that it is of.
//!
//! Each fabric's table has a function of its own for it: one of a row that the compiler makes, each with a place in an
//! array. That way a list shows the devices of one fabric alone, as a process sees those of its machine alone, and no
//! user of the table has to know which of several are meant. A place is free again when both the fabric and the library
//! that was made for it are gone, so that an old library never lists the devices of another fabric.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::ptr;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::raw::RawDevice;
use super::{Function, Shared};
use crate::ibverbs::library::Library;
use crate::ibverbs::sys::ibv_device;

/// One of a row of functions, and its place.
pub(super) type GetDeviceList = unsafe extern "C" fn(num_devices: *mut c_int) -> *mut *mut ibv_device;

struct Place {
    fabric: Weak<Shared>,
    library: Weak<Library>,
}

static PLACES: Mutex<[Option<Place>; FUNCTIONS.len()]> = Mutex::new([const { None }; FUNCTIONS.len()]);

/// Makes a fabric's library with a `ibv_get_device_list` of its own.
///
/// # Panics
/// If too many fabrics exist in this process.
pub(super) fn register(
    fabric: &Arc<Shared>,
    library: impl FnOnce(GetDeviceList) -> Arc<Library>,
) -> Arc<Library> {
    let mut places = PLACES.lock();
    let is_free = |place: &Option<Place>| {
        place.as_ref().is_none_or(|p| p.fabric.strong_count() == 0 && p.library.strong_count() == 0)
    };
    let at = places.iter().position(is_free).expect("fewer fabrics at a time than there are functions");
    let library = library(FUNCTIONS[at]);
    places[at] = Some(Place { fabric: Arc::downgrade(fabric), library: Arc::downgrade(&library) });
    library
}

unsafe extern "C" fn get_device_list<const PLACE: usize>(num_devices: *mut c_int) -> *mut *mut ibv_device {
    list_of(PLACE, num_devices)
}

/// The list is an array of pointers that a null ends. Before the first is a handle of the fabric, so that the devices
/// live as long as the list.
fn list_of(place: usize, num_devices: *mut c_int) -> *mut *mut ibv_device {
    let fabric = PLACES.lock()[place].as_ref().and_then(|place| place.fabric.upgrade());
    let devices = match &fabric {
        Some(fabric) => &fabric.devices[..],
        None => &[],
    };
    if let Some(Err(errno)) =
        fabric.as_ref().map(|fabric| fabric.world.lock().called(Function::GetDeviceList))
    {
        return super::table::null(errno);
    }
    let mut list: Vec<*mut ibv_device> = Vec::with_capacity(devices.len() + 2);
    list.push(ptr::null_mut());
    list.extend(
        devices.iter().map(|device| ptr::from_ref::<RawDevice>(device).cast_mut().cast::<ibv_device>()),
    );
    list.push(ptr::null_mut());
    if !num_devices.is_null() {
        // SAFETY: the caller gives a place for a number, or null.
        unsafe { *num_devices = devices.len() as c_int };
    }
    if let Some(fabric) = fabric {
        list[0] = Arc::into_raw(fabric).cast_mut().cast();
    }
    let list = Box::leak(list.into_boxed_slice());
    // SAFETY: the slice has at least two entries.
    unsafe { list.as_mut_ptr().add(1) }
}

pub(super) unsafe extern "C" fn free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: the list was made above: a box of a handle, pointers, and the null that ends them.
    unsafe {
        let start = list.sub(1);
        let mut entries = 2;
        while !(*start.add(entries - 1)).is_null() {
            entries += 1;
        }
        let list = Box::from_raw(ptr::slice_from_raw_parts_mut(start, entries));
        if !list[0].is_null() {
            drop(Arc::from_raw(list[0].cast_const().cast::<Shared>()));
        }
    }
}

const FUNCTIONS: [GetDeviceList; 1024] = {
    macro_rules! row {
        ($($sixteens:literal)*) => {
            [$(
                get_device_list::<{ $sixteens * 16 }>,
                get_device_list::<{ $sixteens * 16 + 1 }>,
                get_device_list::<{ $sixteens * 16 + 2 }>,
                get_device_list::<{ $sixteens * 16 + 3 }>,
                get_device_list::<{ $sixteens * 16 + 4 }>,
                get_device_list::<{ $sixteens * 16 + 5 }>,
                get_device_list::<{ $sixteens * 16 + 6 }>,
                get_device_list::<{ $sixteens * 16 + 7 }>,
                get_device_list::<{ $sixteens * 16 + 8 }>,
                get_device_list::<{ $sixteens * 16 + 9 }>,
                get_device_list::<{ $sixteens * 16 + 10 }>,
                get_device_list::<{ $sixteens * 16 + 11 }>,
                get_device_list::<{ $sixteens * 16 + 12 }>,
                get_device_list::<{ $sixteens * 16 + 13 }>,
                get_device_list::<{ $sixteens * 16 + 14 }>,
                get_device_list::<{ $sixteens * 16 + 15 }>,
            )*]
        };
    }
    row!(
        0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
        32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
    )
};
