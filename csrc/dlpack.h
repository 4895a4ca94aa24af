// The part of DLPack's C exchange table (its version 1) by which a tensor's address is read without Python's help:
// the layout that https://github.com/dmlc/dlpack fixes. torch.Tensor offers the table as __dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace harmonica::dlpack {

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeTable {
    uint32_t major, minor;  // another major version has another layout
    ExchangeTable* older;
    void* not_used_here[3];
    int (*view)(void* object, Tensor* out);  // owns nothing; -1 and Python's error if the object has no such view
    void* current_stream;
};

}  // namespace harmonica::dlpack
